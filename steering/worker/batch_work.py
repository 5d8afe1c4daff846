"""What there is to do at one hook point: for a slot, and for the tokens of one part of a batch.

`batch_parts` lays a batch out as parts, and `full_path` works through them. Indices are named by
what they count in: ``in_batch``, the pass's tokens; ``in_part``, those of one part, which all have
work; ``in_encode``, those of a part for which one SAE is encoded in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sae.arrays import IntArray
from steering.request.plan import PlannedEdit, PlannedGate, PlannedRead
from steering.request.probe_plan import PlannedProbe
from steering.worker.ops.compiled import CompiledEdits, CompiledGates, CompiledReads, Covers
from steering.worker.probed_tokens import KeptTokens, PooledTokens
from steering.worker.record import RequestRecord


@dataclass(frozen=True)
class SlotWork:
    """What one slot does at one hook point, beyond its entries in the tables.

    Attributes:
        edits: ``(index in the request, edit)`` of the edits that are added here.
        gates: ``(index in the request, gate)`` of the conditions that are read here.
        full: SAEs that must be encoded in full for this slot's tokens.
        decode: the SAE whose reconstruction replaces the stream (``error_term: false``).
        read: what the request reads here.
        prompt_len: tokens of the request's original prompt.
        record: where what is read goes; None if nothing is recorded.
        elsewhere: ``(index in the request, edit)`` of the edits that are read here and added at
            other hook points.
        leaves_output: SAEs that are read here and whose reconstruction other hook points need.
        replaced: the SAE, read at another hook point, whose reconstruction replaces the stream.
        fit: the SAE, read at another hook point, whose reconstruction is compared with the stream.
        probes: ``(index in the request, probe)`` of the probes at this hook point.
    """

    edits: list[tuple[int, PlannedEdit]]
    gates: list[tuple[int, PlannedGate]]
    full: frozenset[int]
    decode: int | None
    read: PlannedRead | None
    prompt_len: int
    record: RequestRecord | None
    elsewhere: Sequence[tuple[int, PlannedEdit]] = ()
    leaves_output: frozenset[int] = frozenset()
    replaced: int | None = None
    fit: int | None = None
    probes: Sequence[tuple[int, PlannedProbe]] = ()

    @property
    def in_torch(self) -> bool:
        """Whether a pass over this slot's tokens runs in torch here."""
        return bool(self.full or self.probes) or self.replaced is not None or self.fit is not None


@dataclass(frozen=True)
class Exact:
    """Entries whose activations are taken from a full encode; all ``[m, e]``.

    Attributes:
        latent: int64, the latent to take.
        is_encoded: bool, whether the entry is of the SAE that is encoded.
    """

    latent: Tensor
    is_encoded: Tensor


@dataclass(frozen=True)
class ReadTokens:
    """The tokens of a full encode that are read, of all requests together.

    Attributes:
        in_encode: ``[r]`` int64.
        in_part: ``[r]`` int64.
        record_np: ``[r]`` the number of each token's record.
        covers: ``[r, 1]`` what the reads cover.
        top_k: the largest ``top_k`` among the reads; 0 if none asks for the strongest features.
        others: the reads that ask for something else, each with its record and its tokens among
            these.
        covers_output: whether the SAE's output, left for where it is written, also says which
            tokens are covered.
    """

    in_encode: Tensor
    in_part: Tensor
    record_np: IntArray
    covers: Covers
    top_k: int
    others: list[tuple[RequestRecord, PlannedRead, slice]]
    covers_output: bool


@dataclass(frozen=True)
class FitTokens:
    """Tokens of a part where a request compares an SAE's reconstruction with the stream.

    Attributes:
        sae: the SAE, which was read at another hook point.
        index: ``[m]`` int64, where the tokens are in the part.
        record: the request's record.
    """

    sae: int
    index: Tensor
    record: RequestRecord


@dataclass(frozen=True)
class FullPart:
    """The tokens of a part for which one SAE is encoded in full.

    Attributes:
        sae: the SAE.
        index: ``[m]`` int64, where the tokens are in the part.
        edits: this SAE's edits that are added here; None if there are none.
        elsewhere: this SAE's edits that are added at other hook points; None if there are none.
        gates: this SAE's conditions; None if there are none.
        leaves_output: whether the reconstruction is needed where the SAE writes.
        decodes: ``[m]`` bool, whether the reconstruction replaces the stream; None if it replaces
            that of no token.
        reads: the tokens that are read; None if none is.
        pools: the tokens whose activations are summed up.
    """

    sae: int
    index: Tensor
    edits: Exact | None
    elsewhere: Exact | None
    gates: Exact | None
    leaves_output: bool
    decodes: Tensor | None
    reads: ReadTokens | None
    pools: list[PooledTokens]


@dataclass(frozen=True)
class BatchPart:
    """The tokens of one part, which all have work here, and that work.

    Nothing of it depends on the stream, so it holds for as long as the batch stays the same.

    Attributes:
        token: the tokens' index in the batch: a slice if they are neighbours, else ``[n]`` int64.
        edits: the edits that are added here; None if no slot among the tokens has any.
        reads: the edits that are read here and added elsewhere; None if no slot has any.
        gates: the conditions that are read here; None if no slot has any.
        full: one entry for each SAE that is encoded in full.
        replaced: ``(SAE, [m] int64 index in the part)`` of the tokens whose stream becomes the
            reconstruction by an SAE that was read at another hook point.
        fits: the tokens whose stream is compared with such a reconstruction.
        kept: the tokens whose stream is kept as the edits leave it.
    """

    token: slice | Tensor
    edits: CompiledEdits | None
    reads: CompiledReads | None
    gates: CompiledGates | None
    full: list[FullPart]
    replaced: list[tuple[int, Tensor]]
    fits: list[FitTokens]
    kept: list[KeptTokens]
