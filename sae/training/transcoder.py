"""A transcoder for SAELens' trainer, which knows none: BatchTopK that writes y from x.

y_hat = f W_dec + b_dec [+ W_skip x], f the largest k activations a token of a batch, as in SAELens'
`BatchTopKTrainingSAE`. Its trainer hands on one tensor a batch, so this takes x and y side by
side. Exported, it is SAELens' JumpReLU (skip) transcoder, with one threshold.

Skip connection: Paulo et al. 2025, "Transcoders Beat Sparse Autoencoders for Interpretability".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.transcoder import JumpReLUSkipTranscoderConfig, JumpReLUTranscoderConfig
from torch import Tensor


@dataclass
class TranscoderConfig(BatchTopKTrainingSAEConfig):
    """Configures a `Transcoder`; `apply_b_dec_to_input` must be False."""

    d_out: int = 1
    skip: bool = False

    def get_inference_config_class(self) -> Any:
        """The configuration of SAELens' class as which it is exported."""
        return JumpReLUSkipTranscoderConfig if self.skip else JumpReLUTranscoderConfig


class Transcoder(BatchTopKTrainingSAE):
    """Writes y from x; everywhere in training a batch is [x, y], `[num_rows, d_in + d_out]`."""

    W_skip: torch.nn.Parameter  # [d_out, d_in]

    def initialize_weights(self) -> None:
        """W_enc and b_enc as an SAE's, a random decoder of d_out columns, and a skip of zeros.

        SAELens starts an SAE's encoder as its decoder's transpose, which makes no sense if the two
        are of different spaces.
        """
        super().initialize_weights()
        d_sae, d_out = self.cfg.d_sae, self.cfg.d_out
        rows = torch.nn.functional.normalize(torch.randn(d_sae, d_out, dtype=self.dtype))
        self.W_dec = torch.nn.Parameter(rows * self.cfg.decoder_init_norm)
        self.b_dec = torch.nn.Parameter(torch.zeros(d_out, dtype=self.dtype))
        if self.cfg.skip:
            self.W_skip = torch.nn.Parameter(torch.zeros(d_out, self.cfg.d_in, dtype=self.dtype))

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """x as it is: b_dec is of y."""
        return sae_in

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations, and the values they were chosen by, of [x, y] or of x alone."""
        found: tuple[Tensor, Tensor] = super().encode_with_hidden_pre(x[..., : self.cfg.d_in])
        return found

    def training_forward_pass(self, step_input: Any) -> Any:
        """One step, in which y less what the skip connection says of it is to be reconstructed."""
        x, y = step_input.sae_in.split([self.cfg.d_in, self.cfg.d_out], dim=-1)
        if self.cfg.skip:
            y = y - x @ self.W_skip.T
        self.mse_loss_fn = lambda predicted, _: (predicted - y).square()
        return super().training_forward_pass(replace(step_input, sae_in=torch.cat([x, y], dim=-1)))

    def calculate_topk_aux_loss(self, sae_in: Tensor, **others: Any) -> Tensor:
        """SAELens' loss of latents that do not fire, of y."""
        loss: Tensor = super().calculate_topk_aux_loss(
            sae_in=sae_in[..., self.cfg.d_in :], **others
        )
        return loss

    @torch.no_grad()
    def fold_affine(self, x_mean: Tensor, x_scale: float, y_mean: Tensor, y_scale: float) -> None:
        """Turn what maps (x - x_mean) x_scale to (y - y_mean) y_scale into what maps x to y.

        The threshold is of activations times the norm of W_dec, which is scaled here.
        """
        self.W_enc.mul_(x_scale)
        self.b_enc.sub_(x_mean @ self.W_enc)
        self.W_dec.div_(y_scale)
        self.topk_threshold.div_(y_scale)
        self.b_dec.div_(y_scale).add_(y_mean)
        if self.cfg.skip:
            self.W_skip.mul_(x_scale / y_scale)
            self.b_dec.sub_(self.W_skip @ x_mean)
