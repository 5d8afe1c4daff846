"""The entries of a batch's tokens as tensors, made once for as long as the batch stays the same.

A batch mostly stays the same from pass to pass, so what does not depend on the stream is made when
the batch is laid out (`compilation`); `batched` then needs about twenty torch calls a pass. In the
shapes ``n`` is the number of tokens and ``e`` the number of entries of the token that has most.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Covers:
    """Which tokens an entry covers; ``[n, e]``, or ``[n, 1]`` for reads.

    Attributes:
        low: int64, the first position.
        high: int64, one past the last position.
        special: bool, whether special tokens are covered too.
        sink_norm: float32, a token whose norm exceeds it is a sink; None if it is infinite for all.
    """

    low: Tensor
    high: Tensor
    special: Tensor
    sink_norm: Tensor | None


@dataclass(frozen=True)
class InputNorms:
    """What activations need if some entry's SAE normalizes its input; all ``[n, e]``.

    Attributes:
        layer: bool, whether the input goes through a layer norm.
        constant: bool, whether it is scaled to a constant norm.
        enc_sum: float32, the sum of the encoder row.
    """

    layer: Tensor
    constant: Tensor
    enc_sum: Tensor


@dataclass(frozen=True)
class RunRows:
    """Rows by runs of neighbouring tokens that name the same ones: one product for each run.

    Attributes:
        bounds: ``(start, stop)`` of each run; together they make up ``[0, n)``.
        row: ``[runs, e]`` int64, places of the rows in the pool.
        W_enc: ``[runs, e, d_in]`` float32, copies of the rows; None if they would take too much
            room.
        W_dec: the same for the decoder; None for conditions, which only read.
    """

    bounds: list[tuple[int, int]]
    row: Tensor
    W_enc: Tensor | None
    W_dec: Tensor | None


@dataclass(frozen=True)
class Latents:
    """The latents that entries read; tensors are ``[n, e]`` float32.

    With ``z = W_enc @ x`` (``x`` normalized if the SAE normalizes its input) the pre-activation is
    ``p = gain * z + bias``, and the activation is ``f = p`` if ``p > threshold`` and
    ``z + gate_bias > 0``, else 0.

    Attributes:
        gate_bias: None if it is infinite for all.
        zero: ``[]``, a zero on the device.
        norms: None if no SAE normalizes its input.
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
    """``f' - f = factor * f + offset``, kept within ``[least, most]``; all ``[n, e]`` float32.

    Clamp is ``v - f``, add is ``v``, scale is ``(v - 1) f``; floor is ``v - f`` kept above 0, and
    cap ``v - f`` kept below 0. An edit without bounds has infinite ones; both are None if no edit
    has any.
    """

    factor: Tensor
    offset: Tensor
    least: Tensor | None
    most: Tensor | None


@dataclass(frozen=True)
class Rereads:
    """Edits whose rows are solved: ``f' = factor * f + offset``, kept within ``[least, most]``.

    All are ``[n, e]``; those of edits whose rows are not solved have no meaning.

    Attributes:
        solved: bool, which edits have solved rows.
        factor: float32.
        offset: float32.
        least: float32.
        most: float32.
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
        one_is_enough: ``[n, e]`` bool, whether one open gate is enough; else all must be open.
        slot: ``[n]`` int64, slot of the token.
        prompt_len: ``[n, 1]`` int32, length of its request's prompt.
    """

    named: Tensor
    one_is_enough: Tensor
    slot: Tensor
    prompt_len: Tensor


@dataclass(frozen=True)
class Reported:
    """Which values are written to a buffer, and where.

    Attributes:
        source: ``[r]`` int64, indices in the flattened ``[n, e]``, or in ``[n]`` for shares.
        target: ``[r]`` int64, indices in the flattened buffer.
    """

    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class Carried:
    """Edits that were read at another hook point; ``[n, e]``.

    Attributes:
        elsewhere: bool, which edits were read at another hook point.
        index: int64, their places in the flattened `Buffers.carried`; 0 for the other edits.
    """

    elsewhere: Tensor
    index: Tensor


@dataclass(frozen=True)
class CompiledEdits:
    """The edits of ``n`` tokens. A token with fewer than ``e`` edits has others that cover nothing.

    Attributes:
        covers: which tokens they cover.
        latents: what they read.
        change: what they ask for.
        rereads: None if no row is solved.
        decoder_scale: ``[n, e]`` float32; None if it is 1 for all.
        max_share: ``[n]`` float32, infinite for no limit; None if no slot has a limit.
        conditions: None if no edit has any.
        carried: None if all edits are read here.
        reported: where the activations of slots that report are written; None if no slot reports.
        shares: where their shares are written; None if no slot reports.
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
        edits: the edits.
        into: where in `Buffers.carried` their changes are left.
    """

    edits: CompiledEdits
    into: Reported


@dataclass(frozen=True)
class CompiledGates:
    """The conditions of ``n`` tokens that are read here.

    Attributes:
        latents: what they read.
        exists: ``[n, e]`` bool, False for what fills up a token with fewer than ``e`` conditions.
        sink_norm: ``[n, e]`` float32, see `Covers`; None if it is infinite for all.
        threshold: ``[n, e]`` float32.
        index: ``[n, e]`` int32, the gate's index in its request.
        low: ``[n, e]`` int64, the first position at which an event counts.
        high: ``[n, e]`` int64, one past the last of them.
        state: ``[n, e]`` int64, index in the flattened `GateState.first_held`.
        kept: ``[n, e]`` bool, whether the first event is kept there.
        f: where the activations are written.
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
