"""The entries of a batch's tokens as tensors that fit them, made once for as long as it stays.

A batch mostly stays the same from pass to pass, so what does not depend on the stream is made when
it is laid out (`compilation`); `batched` then takes some twenty calls a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Covers:
    """Which tokens an entry covers; ``[n, e]``, or ``[n, 1]`` of reads.

    Attributes:
        low: int64, first position.
        high: int64, the one after the last.
        special: bool, special tokens too.
        sink_norm: float32, tokens whose norm exceeds it are spared; None if it is infinite for all.
    """

    low: Tensor
    high: Tensor
    special: Tensor
    sink_norm: Tensor | None


@dataclass(frozen=True)
class InputNorms:
    """What activations need where some entry's SAE normalizes its input; all ``[n, e]``.

    Attributes:
        layer: bool, by layer norm.
        constant: bool, to a constant norm.
        enc_sum: float32, sum of the encoder row.
    """

    layer: Tensor
    constant: Tensor
    enc_sum: Tensor


@dataclass(frozen=True)
class RunRows:
    """Rows by runs of neighbouring tokens that name the same ones: a product for each run.

    Attributes:
        bounds: ``(start, stop)`` of each run; together they are ``[0, n)``.
        row: ``[runs, e]`` int64, rows in the pool.
        W_enc: ``[runs, e, d_in]`` float32, gathered; None where that would take too much room.
        W_dec: the same of the decoder; None of entries that only read.
    """

    bounds: list[tuple[int, int]]
    row: Tensor
    W_enc: Tensor | None
    W_dec: Tensor | None


@dataclass(frozen=True)
class Latents:
    """The latents that entries read: ``p = gain * z + bias``, ``f = p`` if that exceeds
    ``threshold``, else 0; all ``[n, e]`` float32.

    Attributes:
        gate_bias: ``z + gate_bias`` must be positive too; None where it always is.
        zero: ``[]``.
        norms: None where no SAE normalizes its input.
    """

    gain: Tensor
    bias: Tensor
    threshold: Tensor
    gate_bias: Tensor | None
    zero: Tensor
    norms: InputNorms | None
    rows: RunRows


@dataclass(frozen=True)
class Change:
    """``f' - f = factor * f + offset`` kept within bounds; all ``[n, e]`` float32.

    Clamp is ``v - f``, add ``v``, scale ``(v - 1) f``; floor is ``v - f`` where that is positive
    and cap where it is negative. For an edit without bounds they are infinite; both are None where
    no edit has any.
    """

    factor: Tensor
    offset: Tensor
    least: Tensor | None
    most: Tensor | None


@dataclass(frozen=True)
class Rereads:
    """Edits whose rows are solved; ``f' = factor * f + offset`` kept within bounds; ``[n, e]``.

    Attributes:
        solved: bool, which they are.
    """

    solved: Tensor
    factor: Tensor
    offset: Tensor
    least: Tensor
    most: Tensor


@dataclass(frozen=True)
class Conditions:
    """Which gates the edits wait for.

    Attributes:
        named: ``[n, e]`` int32, bits of the gates.
        one_is_enough: ``[n, e]`` bool.
        slot: ``[n]`` int64.
        prompt_len: ``[n, 1]`` int32.
    """

    named: Tensor
    one_is_enough: Tensor
    slot: Tensor
    prompt_len: Tensor


@dataclass(frozen=True)
class Reported:
    """What is recorded, and where.

    Attributes:
        source: ``[r]`` int64, indices in the flattened ``[n, e]``, or ``[n]`` of shares.
        target: ``[r]`` int64, indices in the flattened buffer.
    """

    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class Carried:
    """Edits that were read at another hook point; ``[n, e]``.

    Attributes:
        elsewhere: bool, which they are.
        index: int64, in the flattened ``Buffers.carried``; of the others 0.
    """

    elsewhere: Tensor
    index: Tensor


@dataclass(frozen=True)
class CompiledEdits:
    """The edits of ``n`` tokens, ``e`` the most that one of them has; absent ones cover nothing.

    Attributes:
        carried: None where all were read here.
        decoder_scale: ``[n, e]`` float32; None where it is one for all.
        max_share: ``[n]`` float32, infinite for no limit; None where none has one.
        conditions: None where no edit has any.
        reported: activations of slots that report; None where none does.
        shares: tokens of those slots.
    """

    covers: Covers
    latents: Latents
    change: Change
    rereads: Rereads | None
    decoder_scale: Tensor | None
    max_share: Tensor | None
    conditions: Conditions | None
    carried: Carried | None
    reported: Reported | None
    shares: Reported | None


@dataclass(frozen=True)
class CompiledReads:
    """The edits of ``n`` tokens that are read here and added at other hook points.

    Attributes:
        edits: of the table of those.
        into: where in ``Buffers.carried`` they are left.
    """

    edits: CompiledEdits
    into: Reported


@dataclass(frozen=True)
class CompiledGates:
    """The conditions of ``n`` tokens that are read here, ``e`` the most that one of them has.

    Attributes:
        exists: ``[n, e]`` bool.
        sink_norm: ``[n, e]`` float32; None where it is infinite for all.
        threshold: ``[n, e]`` float32.
        index: ``[n, e]`` int32, which of the request's gates.
        low: ``[n, e]`` int64, first position at which an event counts.
        high: ``[n, e]`` int64, the one after the last.
        state: ``[n, e]`` int64, index in the flattened ``GateState.first_held``.
        kept: ``[n, e]`` bool, whether the first event is kept there.
        f: where activations go.
    """

    latents: Latents
    exists: Tensor
    sink_norm: Tensor | None
    threshold: Tensor
    index: Tensor
    low: Tensor
    high: Tensor
    state: Tensor
    kept: Tensor
    f: Reported
