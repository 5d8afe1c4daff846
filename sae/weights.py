"""An SAE's tensors in the form in which they are computed with, out of its memory-mapped file.

In use are W_enc*s, W_dec/s and b_dec/s, s being the layout's scale, in float32; a transcoder may
have another s for its output. A direction's rows in use have norm 1. If the SAE was trained on a
stream without its mean, the mean of each row of W_enc is subtracted from it:
(e - mean(e)) . x = e . (x - mean(x)). The subtraction of b_dec from the input is folded into the
latents' biases in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sae.architectures import LATENT_VECTORS, VECTORS, LatentVectors
from sae.card import KINDS_THAT_DECODE, SAECard
from sae.errors import SAEError
from sae.formats.layout import SAELayout
from sae.tensors import TensorFile

# Workspace of a pass over all latents or tokens: weights upcast, activations not kept.
WORKSPACE_BYTES = 64 * 2**20
# Bytes: an accelerator's products are fast for matrices that begin at a multiple of it.
_ALIGNMENT = 256


class Weights:
    """The tensors of one SAE. Nothing is resident until it is asked for."""

    def __init__(self, card: SAECard, layout: SAELayout, tensors: TensorFile) -> None:
        self._card = card
        self._layout = layout
        self._tensors = tensors
        self._mapped: dict[str, Tensor] = {}
        self._resident: dict[torch.device, dict[str, Tensor]] = {}

    @property
    def b_dec(self) -> Tensor:
        """[d_out] float32, in the scale of the SAE's output."""
        return self._b_dec().float()

    def W_skip(self, device: torch.device) -> Tensor | None:
        """[d_out, d_in] float32 as it is computed with; None if there is no skip connection."""
        if "W_skip" not in self._layout.tensors:
            return None
        whole = self._on(device, "W_skip")
        return whole.float() * (self._layout.scale / self._scale_out)

    @property
    def matrix_bytes(self) -> int:
        """Bytes of what full passes read, as it is stored."""
        return sum(self._stored(name).nbytes for name in self._matrices)

    @property
    def _matrices(self) -> tuple[str, ...]:
        """What full passes read: a dictionary that does not decode is only encoded with."""
        if self._card.kind not in KINDS_THAT_DECODE:
            return ("W_enc",)
        skip = ("W_skip",) if "W_skip" in self._layout.tensors else ()
        return ("W_enc", "W_dec", *skip)

    @property
    def _scale_out(self) -> float:
        layout = self._layout
        return layout.scale if layout.scale_out is None else layout.scale_out

    def chunks(self, bytes_per_latent: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges [start, stop) of latents, in order, that fit the workspace.

        Args:
            bytes_per_latent: what one latent takes there; None for a float32 row of d_in.
        """
        size = max(1, WORKSPACE_BYTES // (bytes_per_latent or 4 * self._card.d_in))
        for start in range(0, self._card.d_sae, size):
            yield start, min(start + size, self._card.d_sae)

    def encoder_chunks(self, device: torch.device) -> Iterator[tuple[int, int]]:
        """Ranges [start, stop) of latents for which `matrix` gives W_enc, in order.

        They are those of `chunks`, which bound what is copied. On a CPU that computes with W_enc as
        it is stored nothing is copied, and it is a single range: parts of a matrix that is stored
        by columns are multiplied half as fast as all of it.
        """
        if device.type == "cpu":
            row = self.matrix("W_enc", 0, 1, device)
            if _storage(row) == _storage(self._on(device, "W_enc", slice(0, 1))):
                return iter([(0, self._card.d_sae)])
        return self.chunks()

    def index(self, latents: Sequence[int]) -> Tensor:
        """The latents as a tensor [n] int64. Raises IndexError if one is not in [0, d_sae)."""
        for latent in latents:
            if not 0 <= latent < self._card.d_sae:
                raise IndexError(f"latent {latent} not in [0, {self._card.d_sae})")
        return torch.tensor(latents, dtype=torch.long)

    def rows(self, canonical: str, index: Tensor, write: int = 0) -> Tensor:
        """Rows of W_enc [n, d_in] or W_dec [n, d_out] as they are computed with, in float32.

        For rows of W_dec, `write` chooses among the places where the dictionary writes.
        """
        stored = self._stored(canonical)
        if stored.dim() == 3:  # [d_sae, places, d_out]
            stored = stored[:, write]
        return self._in_use(canonical, stored.index_select(0, index))

    def matrix(self, canonical: str, start: int, stop: int, device: torch.device) -> Tensor:
        """The rows of a range of latents, on a device; those of several places are summed."""
        part = self._on(device, canonical, slice(start, stop))
        if part.dim() == 3:
            part = part.sum(dim=1, dtype=torch.float32)
        return self._in_use(canonical, part)

    @property
    def place_bytes(self) -> int:
        """Bytes that `make_resident` needs at a place: the same matrices, each aligned."""
        *first, last = (self._stored(name).nbytes for name in self._matrices)
        return sum(map(_aligned, first)) + last

    def make_resident(self, device: torch.device, place: Tensor | None = None) -> None:
        """Put what full passes read on a device in its stored dtype.

        Args:
            device: the device to put it on.
            place: uint8 [at least place_bytes] on that device, to be overwritten with it; None
                to allocate memory.
        """
        if device in self._resident:
            return
        made: dict[str, Tensor] = {}
        start = 0
        for name in self._matrices:
            stored = self._stored(name)
            if place is None:
                made[name] = torch.empty(stored.shape, dtype=stored.dtype, device=device)
            else:
                part = place[start : start + stored.nbytes]
                made[name] = part.view(stored.dtype).view(stored.shape)
                start = _aligned(start + stored.nbytes)
            made[name].copy_(stored)
        self._resident[device] = made

    def evict(self, device: torch.device) -> None:
        """Let go of what `make_resident` put on a device."""
        self._resident.pop(device, None)

    def vectors(self, index: Tensor, W_enc: Tensor, W_dec: Tensor) -> LatentVectors:
        """The vectors of these latents in float32, given their rows in use [n, d_in], [n, d_out].

        If the dictionary writes at several places, the decoder rows are those of the first.
        """
        architecture = self._card.architecture
        stored = {name: self.vector(name, index) for name in VECTORS[architecture]}
        if self._layout.threshold_over_decoder_norm:
            # W_dec in use is what is stored, divided by the scale.
            stored["threshold"] /= W_dec.double().norm(dim=1) * self._scale_out
        vectors = LATENT_VECTORS[architecture](stored, self._shift(index, W_enc))
        if self._card.rescale_acts_by_decoder_norm:
            vectors = vectors.times(W_dec.double().norm(dim=1))
        return vectors.cast()

    def vectors_of_all(self) -> LatentVectors:
        """The vectors of all latents, on the CPU."""
        parts = []
        # float64 rows take twice the workspace of float32 ones.
        for start, stop in self.chunks(8 * self._card.d_in):
            index = torch.arange(start, stop)
            parts.append(self.vectors(index, self.rows("W_enc", index), self.rows("W_dec", index)))
        return LatentVectors.join(parts)

    def vector(self, name: str, index: Tensor) -> Tensor:
        """A stored vector at these latents: [n] float64."""
        constant = self._layout.constants.get(name)
        if constant is not None:
            return torch.full(index.shape, constant, dtype=torch.float64)
        values: Tensor = self._stored(name).index_select(0, index).double()
        return values.exp() if name == "threshold" and self._layout.log_threshold else values

    def stored_norms(self, canonical: str) -> Tensor:
        """Norms of a matrix's rows as they are stored: [d_sae] float64."""
        stored = self._stored(canonical)
        parts = [stored[start:stop].double().norm(dim=1) for start, stop in self.chunks()]
        return torch.cat(parts)

    def scan_nonfinite(self) -> None:
        """Read every weight once, in float32, as it is computed with.

        Raises:
            SAEError: if one is not finite, or a direction is zero. The message names the tensor and
                the first latent that is bad.
        """
        for canonical, stored in self._layout.tensors.items():
            bad = self._first_nonfinite(canonical)
            if bad is not None:
                whole = stored.scalar or canonical in ("b_dec", "W_skip")
                place = "" if whole else f" of feature {bad}"
                if self._layout.unit_rows:
                    raise SAEError(
                        f"{self._tensors.path}: {stored.name}{place} is zero or has a value that "
                        "is not finite: it has no direction"
                    )
                raise SAEError(
                    f"{self._tensors.path}: {stored.name}{place} has a value that is not finite"
                    f"{' or whose exponential is not' if self._is_exponent(canonical) else ''} "
                    "in float32"
                )

    # Internals

    def _stored(self, canonical: str) -> Tensor:
        """A canonical tensor as a view of the file, in its stored dtype: matrices [d_sae, d_in] and
        [d_sae, d_out], or [d_sae, places, d_out] where there are several."""
        self._tensors.refuse_changed()
        view = self._mapped.get(canonical)
        if view is None:
            stored = self._layout.tensors[canonical]
            tensor = self._tensors.tensor(stored.name)
            if stored.scalar:
                tensor = tensor.reshape(1).expand(self._card.d_sae)
            elif stored.row:
                tensor = tensor.unsqueeze(0)
            elif canonical == "W_dec" and self._layout.stored_places is not None:
                first, count = self._layout.first_place, len(self._layout.write_points)
                places = slice(first, first + count)
                tensor = tensor[:, first] if count == 1 else tensor[:, places]
            view = self._mapped[canonical] = tensor.T if stored.transposed else tensor
        return view

    def _on(self, device: torch.device, canonical: str, rows: slice = slice(None)) -> Tensor:
        """Rows of a matrix as it is stored, on a device: those that `make_resident` put there."""
        whole = self._resident.get(device, {}).get(canonical)
        if whole is None:
            whole = self._stored(canonical)
        part = whole[rows].to(device)
        # Contiguous wherever they come from, so that one kernel multiplies and rounds alike.
        return part if device.type == "cpu" else part.contiguous()

    def _b_dec(self) -> Tensor:
        """[d_out] float64, in the scale of the SAE's output."""
        constant = self._layout.constants.get("b_dec")
        if constant is not None:
            return torch.full((self._card.d_out,), constant, dtype=torch.float64)
        return self._stored("b_dec").double() / self._scale_out

    def _shift(self, index: Tensor, W_enc: Tensor) -> Tensor:
        """W_enc @ b_dec [n] float64, zero where b_dec is not subtracted from the input."""
        if not self._card.apply_b_dec_to_input:
            return torch.zeros(len(index), dtype=torch.float64)
        rows = W_enc.double()
        if self._layout.centered:
            # b_dec is subtracted after the mean of x, so its own mean stays.
            stored = self._stored("W_enc").index_select(0, index)
            rows = self._scaled("W_enc", stored.float()).double()
        return rows @ self._b_dec()

    def _in_use(self, canonical: str, stored: Tensor) -> Tensor:
        """Rows of a matrix as they are computed with, in float32."""
        if self._layout.unit_rows:
            rows = stored.double()
            unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
            return unit.float()
        part = self._scaled(canonical, stored.float())
        if canonical == "W_enc" and self._layout.centered:
            part = part - part.mean(dim=1, keepdim=True)
        return part

    def _scaled(self, canonical: str, part: Tensor) -> Tensor:
        scale = self._layout.scale if canonical == "W_enc" else self._scale_out
        if scale == 1.0:
            return part
        return part * scale if canonical == "W_enc" else part / scale

    def _is_exponent(self, canonical: str) -> bool:
        """Whether what is computed with is the exponential of what is stored."""
        return canonical == "r_mag" or (canonical == "threshold" and self._layout.log_threshold)

    def _first_nonfinite(self, canonical: str) -> int | None:
        tensor = self._stored(canonical)
        if tensor.dim() == 1 or canonical == "W_skip":
            finite = tensor.float().isfinite()
            if self._is_exponent(canonical):
                finite &= tensor.double().exp().float().isfinite()
            bad = (~finite).nonzero()
            return int(bad[0, 0]) if len(bad) else None
        if tensor.dim() == 3:
            places = (self._first_in_matrix(canonical, part) for part in tensor.unbind(dim=1))
            return min((bad for bad in places if bad is not None), default=None)
        return self._first_in_matrix(canonical, tensor)

    def _first_in_matrix(self, canonical: str, tensor: Tensor) -> int | None:
        if self._layout.unit_rows:
            norms = self.stored_norms(canonical)
            bad = (~((norms > 0) & norms.isfinite())).nonzero()
            return int(bad[0]) if len(bad) else None
        # In the order of the file: a strided walk would read every page many times.
        by_latent = tensor.stride(1) == 1
        stored = tensor if by_latent else tensor.T
        first: int | None = None
        for start in range(0, len(stored), size := _rows_per_chunk(stored)):
            part = self._scaled(canonical, stored[start : start + size].float())
            if not bool(part.isfinite().all()):
                bad = (~part.isfinite()).nonzero()
                if by_latent:
                    return start + int(bad[0, 0])
                latent = int(bad[:, 1].min())
                first = latent if first is None else min(first, latent)
        return first


def _aligned(size: int) -> int:
    """Where what follows `size` bytes may begin, whatever its dtype."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _rows_per_chunk(matrix: Tensor) -> int:
    return max(1, WORKSPACE_BYTES // (4 * matrix.shape[1]))


def _storage(tensor: Tensor) -> int:
    """Where the memory that a tensor is a view of begins."""
    return tensor.untyped_storage().data_ptr()
