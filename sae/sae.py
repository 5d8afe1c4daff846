"""An SAE over memory-mapped weights: single rows for steering, whole passes for reading.

    x_in = norm_in(x);  z = W_enc x_in;  f = activation(z);  x_hat = norm_out(f W_dec + b_dec)

The subtraction of b_dec from the input is folded into the latents' biases in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sae.architectures import LATENT_VECTORS, VECTORS, LatentVectors, topk
from sae.card import UNIT_PLAIN, UNIT_TIMES_DECODER_NORM, SAECard
from sae.errors import SAEError
from sae.features import FeatureTable
from sae.formats import open_layout
from sae.formats.layout import SAELayout
from sae.normalization import denormalise, normalise
from sae.product import product
from sae.source import SAEReference, resolve
from sae.tensors import TensorFile

# Workspace of a pass over all latents or tokens: weights upcast, activations not kept.
WORKSPACE_BYTES = 64 * 2**20
# What an accelerator's products like a matrix to begin at.
_ALIGNMENT = 256


@dataclass(frozen=True)
class LatentRows:
    """n latents, ready for steering; all float32, on the CPU, contiguous.

    With z = W_enc @ norm_in(x): act = gain*z + bias; gate = z + gate_bias;
    f = act if act > threshold and gate > 0 else 0 (topk: also only in the token's top k).
    Edit: x + sum_i (f'_i - f_i) * decoder_scale_i * W_dec_i * g_token.
    """

    W_enc: Tensor  # [n, d_in]
    W_dec: Tensor  # [n, d_in]
    bias: Tensor  # [n]
    gain: Tensor  # [n]
    threshold: Tensor  # [n]
    gate_bias: Tensor  # [n]
    decoder_scale: Tensor  # [n]


class SAE:
    """One opened SAE. Nothing is resident until asked for; every read is of the memory map."""

    def __init__(self, card: SAECard, layout: SAELayout, tensors: TensorFile) -> None:
        self._card = card
        self._layout = layout
        self._tensors = tensors
        self._lock = threading.Lock()
        self._mapped: dict[str, Tensor] = {}
        self._all_vectors: dict[torch.device, LatentVectors] = {}
        self._resident: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.weight_bytes = tensors.nbytes

    @property
    def card(self) -> SAECard:
        return self._card

    @property
    def b_dec(self) -> Tensor:
        """The decoder's bias [d_in] float32, in the scale of the SAE's output."""
        return (self._stored("b_dec").double() / self._layout.scale).float()

    # Rows

    def rows(self, latents: Sequence[int]) -> LatentRows:
        """Read only these latents. IndexError for one that is not in [0, d_sae)."""
        index = self._index(latents)
        W_enc, W_dec = self._rows_of("W_enc", index), self._rows_of("W_dec", index)
        return LatentRows(W_enc, W_dec, **vars(self._vectors(index, W_enc, W_dec)))

    def nonfinite_latents(self, latents: Sequence[int]) -> list[int]:
        """Those of the latents that have a weight or bias which is NaN or infinite."""
        index = self._index(latents)
        rows = self.rows(latents)
        finite = rows.W_enc.isfinite().all(dim=1) & rows.W_dec.isfinite().all(dim=1)
        finite &= rows.gain.isfinite()
        for name in VECTORS[self._card.architecture]:
            finite &= self._vector(name, index).float().isfinite()
        return [latent for latent, good in zip(latents, finite.tolist(), strict=True) if not good]

    def decoder_rows(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """W_dec[start:stop] as [stop - start, d_in] float32 on the device."""
        target = _indexed(device)
        return self._in_use("W_dec", self._part("W_dec", start, stop, target))

    def decoder_row_norms(self) -> Tensor:
        """|W_dec_i| of all latents: [d_sae] float32, CPU."""
        norms = [
            self.decoder_rows(start, stop).double().norm(dim=1).float()
            for start, stop in self.chunks()
        ]
        return torch.cat(norms)

    def chunks(self, bytes_per_latent: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of latents whose float32 rows fit the workspace together."""
        size = max(1, WORKSPACE_BYTES // (bytes_per_latent or 4 * self._card.d_in))
        for start in range(0, self._card.d_sae, size):
            yield start, min(start + size, self._card.d_sae)

    # Whole passes

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, d_in] float32 -> (norm_in(x) [n, d_in], g [n]), g the SAE's output scale."""
        return normalise(self._card.normalize_activations, x)

    def encode(self, x: Tensor) -> Tensor:
        """All activations, exactly: x [n, d_in] float32, any device -> f [n, d_sae] float32."""
        x_in, _ = self.normalise(x)
        vectors = self._vectors_of_all(x.device)
        f = x.new_empty(x.shape[0], self._card.d_sae)
        for start, stop in self.chunks():
            rows = self._in_use("W_enc", self._part("W_enc", start, stop, x.device))
            f[:, start:stop] = self._activate(product(x_in, rows), vectors.part(start, stop))
        if not self._card.exact_from_row:
            assert self._card.k is not None
            topk.select(f, self._card.k, signed=self._card.architecture == "abstopk")
        return f

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        """f [n, d_sae] and the x [n, d_in] it came from -> x_hat [n, d_in] float32, with b_dec."""
        scale = self._vectors_of_all(f.device).decoder_scale
        out = self.b_dec.to(f.device).repeat(f.shape[0], 1)
        for start, stop in self.chunks():
            W_dec = self.decoder_rows(start, stop, f.device)
            out += product(f[:, start:stop] * scale[start:stop], W_dec.T)
        _, g = self.normalise(x)
        return denormalise(self._card.normalize_activations, out, x, g)

    def activations(self, x: Tensor, latents: Sequence[int]) -> Tensor:
        """f of these latents: x [n, d_in] float32 -> [n, len(latents)] float32."""
        index = self._index(latents)
        if self._card.exact_from_row:
            W_enc = self._rows_of("W_enc", index)
            vectors = self._vectors(index, W_enc, self._rows_of("W_dec", index))
            x_in, _ = self.normalise(x)
            return self._activate(x_in @ W_enc.to(x.device).T, vectors.to(x.device))
        index = index.to(x.device)
        tokens = max(1, WORKSPACE_BYTES // (4 * self._card.d_sae))
        parts = [self.encode(part).index_select(1, index) for part in torch.split(x, tokens)]
        return torch.cat(parts)

    # Where weights live

    @property
    def matrix_bytes(self) -> int:
        """Size of W_enc and W_dec as they are stored."""
        return sum(self._stored(name).nbytes for name in ("W_enc", "W_dec"))

    @property
    def place_bytes(self) -> int:
        """Size of a place for W_enc and W_dec as they are stored, one after the other."""
        return _aligned(self._stored("W_enc").nbytes) + self._stored("W_dec").nbytes

    def resident(self, device: torch.device | str, place: Tensor | None = None) -> None:
        """Put W_enc and W_dec on a device in their stored dtype, for full passes there.

        Args:
            device: where to.
            place: uint8 [at least place_bytes] on that device, to be overwritten with them; None
                for memory of their own.
        """
        target = _indexed(device)
        if target in self._resident:
            return
        stored = [self._stored(name) for name in ("W_enc", "W_dec")]
        if place is None:
            W_enc, W_dec = (torch.empty(m.shape, dtype=m.dtype, device=target) for m in stored)
        else:
            starts = (0, _aligned(stored[0].nbytes))
            W_enc, W_dec = (
                place[start : start + m.nbytes].view(m.dtype).view(m.shape)
                for start, m in zip(starts, stored, strict=True)
            )
        for made, m in zip((W_enc, W_dec), stored, strict=True):
            made.copy_(m)
        self._resident[target] = (W_enc, W_dec)

    def evict(self, device: torch.device | str) -> None:
        """Let go of what `resident` put on a device."""
        self._resident.pop(_indexed(device), None)

    def prepare(self, device: torch.device | str) -> None:
        """Work out on a device what else a full pass needs, which reads every weight once."""
        self._vectors_of_all(_indexed(device))

    # Checks

    def scan_nonfinite(self) -> None:
        """Read every weight once; SAEError naming the tensor and the first latent that is bad.

        What is tested is what is computed with: a float64 that is too large for float32 is bad.
        """
        for canonical, stored in self._layout.tensors.items():
            bad = self._first_nonfinite(canonical)
            if bad is not None:
                place = "" if canonical == "b_dec" or stored.scalar else f" of feature {bad}"
                raise SAEError(
                    f"{self._tensors.path}: {stored.name}{place} has a value that is not finite"
                    f"{' or whose exponential is not' if canonical == 'r_mag' else ''} in float32"
                )

    def refuse_changed(self) -> None:
        """SAEError where the weight file was written to since it was opened."""
        self._tensors.refuse_changed()

    def sha256(self) -> str:
        """SHA-256 of the weight file, in hexadecimal; computed once, then also on the card."""
        with self._lock:
            if self._card.sha256 is None:
                self._card = replace(self._card, sha256=self._tensors.sha256())
            assert self._card.sha256 is not None
            return self._card.sha256

    # Internals

    def _stored(self, canonical: str) -> Tensor:
        """A canonical tensor as a view of the file: stored dtype, [d_sae, d_in] for matrices."""
        self._tensors.refuse_changed()
        view = self._mapped.get(canonical)
        if view is None:
            stored = self._layout.tensors[canonical]
            tensor = self._tensors.tensor(stored.name)
            if stored.scalar:
                tensor = tensor.reshape(1).expand(self._card.d_sae)
            view = self._mapped[canonical] = tensor.T if stored.transposed else tensor
        return view

    def _matrix(self, canonical: str, device: torch.device) -> Tensor:
        resident = self._resident.get(device)
        if resident is None:
            return self._stored(canonical)
        return resident[0] if canonical == "W_enc" else resident[1]

    def _part(self, canonical: str, start: int, stop: int, device: torch.device) -> Tensor:
        """Rows of a matrix on a device, in their stored dtype.

        On an accelerator they are contiguous wherever they come from, so that one kernel multiplies
        them and rounds alike.
        """
        part = self._matrix(canonical, device)[start:stop].to(device)
        return part if device.type == "cpu" else part.contiguous()

    def _vector(self, name: str, index: Tensor) -> Tensor:
        """A stored vector at these latents: [n] float64."""
        constant = self._layout.constants.get(name)
        if constant is not None:
            return torch.full(index.shape, constant, dtype=torch.float64)
        return self._stored(name).index_select(0, index).double()

    def _rows_of(self, canonical: str, index: Tensor) -> Tensor:
        """Rows of W_enc or W_dec [n, d_in] float32, contiguous, with the SAE's scale folded in."""
        return self._in_use(canonical, self._stored(canonical).index_select(0, index))

    def _in_use(self, canonical: str, stored: Tensor) -> Tensor:
        """Part of a matrix as it is computed with: float32, with the SAE's scale folded in."""
        part, scale = stored.float(), self._layout.scale
        if scale == 1.0:
            return part
        return part * scale if canonical == "W_enc" else part / scale

    def _vectors(self, index: Tensor, W_enc: Tensor, W_dec: Tensor) -> LatentVectors:
        """The vectors of these latents in float32, given their rows [n, d_in]."""
        architecture = self._card.architecture
        stored = {name: self._vector(name, index) for name in VECTORS[architecture]}
        if self._card.apply_b_dec_to_input:
            shift = W_enc.double() @ (self._stored("b_dec").double() / self._layout.scale)
        else:
            shift = torch.zeros(len(index), dtype=torch.float64)
        vectors = LATENT_VECTORS[architecture](stored, shift)
        if self._card.rescale_acts_by_decoder_norm:
            vectors = vectors.times(W_dec.double().norm(dim=1))
        return vectors.cast()

    def _vectors_of_all(self, device: torch.device) -> LatentVectors:
        """The vectors of all latents on a device, computed once."""
        with self._lock:
            if device not in self._all_vectors:
                cpu = torch.device("cpu")
                if cpu not in self._all_vectors:
                    self._all_vectors[cpu] = self._compute_vectors()
                self._all_vectors[device] = self._all_vectors[cpu].to(device)
            return self._all_vectors[device]

    def _compute_vectors(self) -> LatentVectors:
        parts = []
        # float64 rows take twice the workspace of float32 ones.
        for start, stop in self.chunks(8 * self._card.d_in):
            index = torch.arange(start, stop)
            W_enc, W_dec = self._rows_of("W_enc", index), self._rows_of("W_dec", index)
            parts.append(self._vectors(index, W_enc, W_dec))
        return LatentVectors.join(parts)

    def _activate(self, z: Tensor, vectors: LatentVectors) -> Tensor:
        if self._card.exact_from_row:
            return vectors.activate(z, gated=self._card.architecture == "gated")
        return vectors.preactivate(z)

    def _index(self, latents: Sequence[int]) -> Tensor:
        for latent in latents:
            if not 0 <= latent < self._card.d_sae:
                raise IndexError(f"latent {latent} not in [0, {self._card.d_sae})")
        return torch.tensor(latents, dtype=torch.long)

    def _first_nonfinite(self, canonical: str) -> int | None:
        tensor = self._stored(canonical)
        if tensor.dim() == 1:
            finite = tensor.float().isfinite()
            if canonical == "r_mag":  # used as a gain
                finite &= tensor.double().exp().float().isfinite()
            bad = (~finite).nonzero()
            return int(bad[0]) if len(bad) else None
        # In the order of the file: a strided walk would read every page many times.
        by_latent = tensor.is_contiguous()
        stored = tensor if by_latent else tensor.T
        first: int | None = None
        for start in range(0, len(stored), size := _rows_per_chunk(stored)):
            part = self._in_use(canonical, stored[start : start + size])
            if not bool(part.isfinite().all()):
                bad = (~part.isfinite()).nonzero()
                if by_latent:
                    return start + int(bad[0, 0])
                latent = int(bad[:, 1].min())
                first = latent if first is None else min(first, latent)
        return first


def open_sae(ref: SAEReference) -> SAE:
    """Open an SAE at the cost of its header; SAEError for every misfit that a file can show."""
    ref = resolve(ref)
    files, layout = open_layout(ref)
    W_dec = files.tensors.headers[layout.tensors["W_dec"].name]
    features = FeatureTable.open(files.path, layout.d_sae)
    card = SAECard(
        id=ref.name,
        hook=str(layout.hook),
        layer=layout.hook.layer,
        architecture=layout.architecture,
        d_in=layout.d_in,
        d_sae=layout.d_sae,
        dtype=W_dec.dtype,
        source=ref.source,
        format=layout.format,
        sha256=None,
        sink_norm=layout.sink_norm if ref.sink_norm is None else ref.sink_norm,
        error_term=True,
        has_labels=features.has_labels,
        has_max_activations=features.has_max_activations,
        k=layout.k,
        normalize_activations=layout.normalize_activations,
        apply_b_dec_to_input=layout.apply_b_dec_to_input,
        rescale_acts_by_decoder_norm=layout.rescale_acts_by_decoder_norm,
        activation_unit=(
            UNIT_TIMES_DECODER_NORM if layout.rescale_acts_by_decoder_norm else UNIT_PLAIN
        ),
    )
    sae = SAE(card, layout, files.tensors)
    # One bad value here reaches every token that the SAE reads, whatever the latent.
    if not bool(sae.b_dec.isfinite().all()):
        raise SAEError(f"{Path(files.path)}: b_dec has a value that is not finite")
    return sae


def check_fits(card: SAECard, d_model: int, num_layers: int) -> None:
    """SAEError where the SAE cannot belong to a model of this width and depth."""
    if card.d_in != d_model:
        raise SAEError(
            f"SAE {card.id!r}: d_in is {card.d_in}, the model's hidden size is {d_model}"
        )
    if card.layer >= num_layers:
        raise SAEError(
            f"SAE {card.id!r}: layer {card.layer} does not exist, the model has layers "
            f"0 to {num_layers - 1}"
        )


def _indexed(device: torch.device | str) -> torch.device:
    """The device as its tensors name it: cuda is cuda:0, say."""
    return torch.empty(0, device=device).device


def _aligned(size: int) -> int:
    """Where what follows `size` bytes may begin, whatever its dtype."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _rows_per_chunk(matrix: Tensor) -> int:
    return max(1, WORKSPACE_BYTES // (4 * matrix.shape[1]))
