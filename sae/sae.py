"""An SAE over memory-mapped weights: single rows for steering, whole passes for reading.

x_in = norm_in(x);  z = W_enc x_in;  f = activation(z);  x_hat = norm_out(f W_dec + b_dec)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae import weights
from sae.architectures import VECTORS, LatentVectors, topk
from sae.card import (
    HEADS,
    KIND_DIRECTION,
    KIND_TRANSCODER,
    KINDS_THAT_DECODE,
    UNIT_PLAIN,
    UNIT_TIMES_DECODER_NORM,
    HookPoint,
    SAECard,
)
from sae.errors import SAEError
from sae.features import FeatureTable
from sae.formats import open_layout
from sae.formats.layout import SAELayout
from sae.normalization import denormalize, normalize
from sae.product import product
from sae.source import ResolvedSAE, SAEReference, resolve
from sae.tensors import TensorFile
from sae.weights import Weights


@dataclass(frozen=True)
class LatentRows:
    """n latents, ready for steering; all float32, on the CPU, contiguous.

    With z = W_enc @ norm_in(x): act = gain*z + bias; gate = z + gate_bias;
    f = act if act > threshold and gate > 0 else 0 (topk: also only in the token's top k).
    Edit: x + sum_i (f'_i - f_i) * decoder_scale_i * W_dec_i * g_token.
    """

    W_enc: Tensor  # [n, d_in]
    W_dec: Tensor  # [n, d_out], of one of the places where the dictionary writes
    bias: Tensor  # [n]
    gain: Tensor  # [n]
    threshold: Tensor  # [n]
    gate_bias: Tensor  # [n]
    decoder_scale: Tensor  # [n]


class SAE:
    """One opened SAE. Nothing is resident until it is asked for; all reads use the memory map."""

    def __init__(self, card: SAECard, layout: SAELayout, tensors: TensorFile) -> None:
        self._card = card
        self._centered = layout.centered
        self._weights = Weights(card, layout, tensors)
        self._tensors = tensors
        self._lock = threading.Lock()
        self._all_vectors: dict[torch.device, LatentVectors] = {}
        self._biases: dict[torch.device, Tensor] = {}
        self.weight_bytes = tensors.nbytes
        # What the files leave open and how it was taken, a line each.
        self.remarks = layout.remarks
        # What is made of the weights beside what the card says: configurations state some of it.
        self.arithmetic = layout.arithmetic

    @property
    def card(self) -> SAECard:
        """What the SAE is, without its weights."""
        return self._card

    @property
    def b_dec(self) -> Tensor:
        """The decoder's bias [d_out] float32, in the scale of the SAE's output."""
        return self._weights.b_dec

    def open_features(self) -> FeatureTable:
        """Labels and statistics, from beside the weights; a direction's maximum is its length."""
        maxima = self._lengths if self._card.kind == KIND_DIRECTION else None
        return FeatureTable.open(self._tensors.path, self._card.d_sae, maxima)

    # Rows

    def rows(self, latents: Sequence[int], write: int = 0) -> LatentRows:
        """Read only these latents, and what they write at `card.writes[write]`.

        Raises IndexError if a latent is not in [0, d_sae).
        """
        assert 0 <= write < len(self._card.writes), write
        index = self._weights.index(latents)
        W_enc, W_dec = self._weights.rows("W_enc", index), self._weights.rows("W_dec", index)
        vectors = self._weights.vectors(index, W_enc, W_dec)
        if write:
            W_dec = self._weights.rows("W_dec", index, write)
        return LatentRows(W_enc, W_dec, **vars(vectors))

    def nonfinite_latents(self, latents: Sequence[int]) -> list[int]:
        """Those of the latents that have a weight or a bias that is NaN or infinite."""
        index = self._weights.index(latents)
        rows = self.rows(latents)
        finite = rows.W_enc.isfinite().all(dim=1) & rows.gain.isfinite()
        for write in range(len(self._card.writes)):
            finite &= self._weights.rows("W_dec", index, write).isfinite().all(dim=1)
        for name in VECTORS[self._card.architecture]:
            finite &= self._weights.vector(name, index).float().isfinite()
        return [latent for latent, good in zip(latents, finite.tolist(), strict=True) if not good]

    def decoder_rows(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """W_dec[start:stop] as [stop - start, d_out] float32 on the device.

        For a dictionary that writes at several places it is the sum over them: what a latent adds
        to the stream in all.
        """
        return self._weights.matrix("W_dec", start, stop, _indexed(device))

    def written_by(self, latents: Sequence[int]) -> Tensor:
        """What one unit of each latent writes: [n, d_out] float32, the decoder's scale folded in.

        Of a dictionary that writes at several places it is the sum, as in `decoder_rows`. Not times
        g, the scale of an input that is normalized.
        """
        rows = self.rows(latents)
        W_dec = rows.W_dec
        index = self._weights.index(latents)
        for write in range(1, len(self._card.writes)):
            W_dec = W_dec + self._weights.rows("W_dec", index, write)
        return W_dec * rows.decoder_scale[:, None]

    def decoder_row_norms(self) -> Tensor:
        """|W_dec_i| of all latents: [d_sae] float32, CPU."""
        norms = [
            self.decoder_rows(start, stop).double().norm(dim=1).float()
            for start, stop in self.chunks()
        ]
        return torch.cat(norms)

    def chunks(self, bytes_per_latent: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges [start, stop) of latents, in order, that fit the workspace.

        Args:
            bytes_per_latent: what one latent takes there; None for a float32 row of d_in.
        """
        return self._weights.chunks(bytes_per_latent)

    # Whole passes

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, d_in] float32 -> (norm_in(x) [n, d_in], g [n]), g the SAE's output scale."""
        return normalize(self._card.normalize_activations, x)

    def encode(self, x: Tensor) -> Tensor:
        """All activations, exactly: x [n, d_in] float32, any device -> f [n, d_sae] float32."""
        x_in, _ = self.normalize(x)
        vectors = self._vectors_of_all(x.device)
        f = x.new_empty(x.shape[0], self._card.d_sae)
        for start, stop in self._weights.encoder_chunks(x.device):
            rows = self._weights.matrix("W_enc", start, stop, x.device)
            f[:, start:stop] = self._activate(product(x_in, rows), vectors.part(start, stop))
        if not self._card.exact_from_row:
            assert self._card.k is not None
            topk.select(f, self._card.k, signed=self._card.signed)
        return f

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        """f [n, d_sae] and the x [n, d_in] it came from -> x_hat [n, d_out] float32, with b_dec.

        For a transcoder x_hat is its approximation of the output y, skip connection included. An
        SAE that reads x without its mean says nothing of the mean: x_hat has that of x.
        """
        assert self._card.kind in KINDS_THAT_DECODE, self._card.kind
        out = self._add_written(self._bias(f.device).repeat(f.shape[0], 1), f)
        W_skip = self._weights.W_skip(x.device)
        if W_skip is not None:
            out += product(x, W_skip)
        if self._card.kind == KIND_TRANSCODER:
            return out
        _, g = self.normalize(x)
        out = denormalize(self._card.normalize_activations, out, x, g)
        return out + x.mean(dim=-1, keepdim=True) if self._centered else out

    def written(self, f: Tensor) -> Tensor:
        """f [n, d_sae] -> what the features alone write, [n, d_out] float32.

        Bias and skip connection are left out, and so is g if the SAE normalizes its input. It is
        defined for every kind of dictionary; for one that writes at several places it is the sum.
        """
        return self._add_written(f.new_zeros(f.shape[0], self._card.d_out), f)

    def _add_written(self, out: Tensor, f: Tensor) -> Tensor:
        scale = self._vectors_of_all(f.device).decoder_scale
        for start, stop in self.chunks():
            W_dec = self.decoder_rows(start, stop, f.device)
            out += product(f[:, start:stop] * scale[start:stop], W_dec.T)
        return out

    def activations(self, x: Tensor, latents: Sequence[int]) -> Tensor:
        """f of these latents: x [n, d_in] float32 -> [n, len(latents)] float32."""
        index = self._weights.index(latents)
        if self._card.exact_from_row:
            W_enc = self._weights.rows("W_enc", index)
            vectors = self._weights.vectors(index, W_enc, self._weights.rows("W_dec", index))
            x_in, _ = self.normalize(x)
            return self._activate(x_in @ W_enc.to(x.device).T, vectors.to(x.device))
        index = index.to(x.device)
        tokens = max(1, weights.WORKSPACE_BYTES // (4 * self._card.d_sae))
        parts = [self.encode(part).index_select(1, index) for part in torch.split(x, tokens)]
        return torch.cat(parts)

    # Where weights live

    @property
    def matrix_bytes(self) -> int:
        """Bytes of what full passes read as it is stored: W_enc; W_dec and W_skip if it decodes."""
        return self._weights.matrix_bytes

    @property
    def place_bytes(self) -> int:
        """Bytes that `resident` needs at a place: the same matrices, each aligned."""
        return self._weights.place_bytes

    def resident(self, device: torch.device | str, place: Tensor | None = None) -> None:
        """Put what full passes read on a device in its stored dtype.

        Args:
            device: the device to put it on.
            place: uint8 [at least place_bytes] on that device, to be overwritten with it; None
                to allocate memory.
        """
        self._weights.make_resident(_indexed(device), place)

    def evict(self, device: torch.device | str) -> None:
        """Let go of what `resident` put on a device."""
        self._weights.evict(_indexed(device))

    def prepare(self, device: torch.device | str) -> None:
        """Work out on a device what else a full pass needs, which reads every weight once."""
        self._vectors_of_all(_indexed(device))
        self._bias(_indexed(device))

    # Checks

    def scan_nonfinite(self) -> None:
        """Read every weight once, in float32, as it is computed with.

        Raises:
            SAEError: if one is not finite, or a direction is zero. The message names the tensor and
                the first latent that is bad.
        """
        self._weights.scan_nonfinite()

    def refuse_changed(self) -> None:
        """Raises SAEError if the weight file was written to since it was opened."""
        self._tensors.refuse_changed()

    def sha256(self) -> str:
        """SHA-256 of the weights, in hexadecimal; computed once, then also on the card."""
        with self._lock:
            if self._card.sha256 is None:
                self._card = replace(self._card, sha256=self._tensors.sha256())
            assert self._card.sha256 is not None
            return self._card.sha256

    # Internals

    def _lengths(self) -> list[float]:
        norms: list[float] = self._weights.stored_norms("W_dec").tolist()
        return norms

    def _vectors_of_all(self, device: torch.device) -> LatentVectors:
        """The vectors of all latents on a device, computed once."""
        with self._lock:
            if device not in self._all_vectors:
                cpu = torch.device("cpu")
                if cpu not in self._all_vectors:
                    self._all_vectors[cpu] = self._weights.vectors_of_all()
                self._all_vectors[device] = self._all_vectors[cpu].to(device)
            return self._all_vectors[device]

    def _bias(self, device: torch.device) -> Tensor:
        """`b_dec` on a device, brought there once: each copy waits for what the device does."""
        with self._lock:
            if device not in self._biases:
                self._biases[device] = self.b_dec.to(device)
            return self._biases[device]

    def _activate(self, z: Tensor, vectors: LatentVectors) -> Tensor:
        if self._card.exact_from_row:
            return vectors.activate(z, gated=self._card.architecture == "gated")
        return vectors.preactivate(z)


def open_sae(ref: SAEReference | ResolvedSAE) -> SAE:
    """Open an SAE at the cost of its header.

    Args:
        ref: resolved first if it is not yet, which may fetch it.

    Raises:
        SAEError: for every misfit that a file can show.
    """
    resolved = resolve(ref)
    files, layout = open_layout(resolved)
    W_dec = files.tensors.headers[layout.tensors["W_dec"].name]
    features = FeatureTable.open(files.path, layout.d_sae)
    is_direction = layout.kind == KIND_DIRECTION
    card = SAECard(
        id=resolved.name,
        hook=str(layout.hook),
        layer=layout.read_point.layer,
        architecture=layout.architecture,
        d_in=layout.d_in,
        d_sae=layout.d_sae,
        dtype=W_dec.dtype,
        source=resolved.source,
        format=layout.format,
        sha256=None,
        sink_norm=layout.sink_norm if resolved.sink_norm is None else resolved.sink_norm,
        error_term=layout.kind in KINDS_THAT_DECODE,
        has_labels=features.has_labels,
        has_max_activations=features.has_max_activations or is_direction,
        k=layout.k,
        normalize_activations=layout.normalize_activations,
        apply_b_dec_to_input=layout.apply_b_dec_to_input,
        rescale_acts_by_decoder_norm=layout.rescale_acts_by_decoder_norm,
        activation_unit=(
            UNIT_TIMES_DECODER_NORM if layout.rescale_acts_by_decoder_norm else UNIT_PLAIN
        ),
        kind=layout.kind,
        reads=str(layout.read_point),
        writes=tuple(map(str, layout.write_points)),
        d_out=layout.width_out,
    )
    sae = SAE(card, layout, files.tensors)
    # One bad value here reaches every token that the SAE reads, whatever the latent.
    if not bool(sae.b_dec.isfinite().all()):
        raise SAEError(f"{files.path}: b_dec has a value that is not finite")
    return sae


def check_fits(card: SAECard, d_model: int, num_layers: int) -> None:
    """Raises SAEError if the SAE cannot belong to a model of this width and depth.

    The width of attention's heads is known, and checked, only when the model is loaded.
    """
    reads = ("d_in", card.d_in, card.reads)
    for name, width, hook in (reads, *(("d_out", card.d_out, hook) for hook in card.writes)):
        point = HookPoint.parse(hook)
        if point.kind != HEADS and width != d_model:
            raise SAEError(
                f"SAE {card.id!r}: {name} is {width}, the model's hidden size is {d_model}"
            )
        if point.layer >= num_layers:
            raise SAEError(
                f"SAE {card.id!r}: layer {point.layer} does not exist, the model has layers "
                f"0 to {num_layers - 1}"
            )


def _indexed(device: torch.device | str) -> torch.device:
    """The device as its tensors name it: for "cuda" it is "cuda:0", say."""
    return torch.empty(0, device=device).device
