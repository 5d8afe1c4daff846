"""The one form that every architecture's latents take: five numbers each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentVectors:
    """What turns z = W_enc @ norm_in(x) into activations, and those into edits; all [n].

    act = gain * z + bias;  gate = z + gate_bias;  f = act if act > threshold and gate > 0 else 0
    The decoder's part of f_i is f_i * decoder_scale_i * W_dec_i.
    Architectures make them in float64; `cast` to float32 is the last step.
    """

    bias: Tensor
    gain: Tensor
    threshold: Tensor
    gate_bias: Tensor
    decoder_scale: Tensor

    def times(self, norm: Tensor) -> LatentVectors:
        """The same latents with activations multiplied by the decoder norms [n] >= 0.

        The decoder scale is divided by them, so that what is written stays the same.
        """
        return LatentVectors(
            bias=self.bias * norm,
            gain=self.gain * norm,
            threshold=self.threshold * norm,
            gate_bias=self.gate_bias,
            # A latent that writes nothing is never active in this unit; it must not write NaN.
            decoder_scale=torch.where(norm > 0, self.decoder_scale / norm, 0),
        )

    def activate(self, z: Tensor, *, gated: bool) -> Tensor:
        """f [tokens, n] of z [tokens, n], as above."""
        act = torch.addcmul(self.bias, z, self.gain)
        passes = act > self.threshold
        if gated:
            passes &= z + self.gate_bias > 0
        return torch.where(passes, act, 0)

    def preactivate(self, z: Tensor) -> Tensor:
        """act [tokens, n] of z [tokens, n]: h of a top-k SAE, before the selection."""
        return torch.addcmul(self.bias, z, self.gain)

    def cast(self) -> LatentVectors:
        """The vectors in float32."""
        return self._each(Tensor.float)

    def to(self, device: torch.device) -> LatentVectors:
        """The vectors on a device."""
        return self._each(lambda vector: vector.to(device))

    def part(self, start: int, stop: int) -> LatentVectors:
        """The vectors of the latents in [start, stop)."""
        return self._each(lambda vector: vector[start:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> LatentVectors:
        return LatentVectors(*(change(vector) for vector in vars(self).values()))

    @classmethod
    def join(cls, parts: Sequence[LatentVectors]) -> LatentVectors:
        """The vectors of all parts, one after the other."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))


def ungated(bias: Tensor, threshold: Tensor) -> LatentVectors:
    """Latents with gain 1 whose gate is always open; bias and threshold are [n] float64."""
    return LatentVectors(
        bias=bias,
        gain=torch.ones_like(bias),
        threshold=threshold,
        gate_bias=torch.full_like(bias, torch.inf),
        decoder_scale=torch.ones_like(bias),
    )
