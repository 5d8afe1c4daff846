"""Conditions and edits spelled out, token by token: what every other version must agree with."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from steering.worker.ops.buffers import Buffers, InputNorm
from steering.worker.ops.layout import (
    ANY_GATE,
    CARRIED,
    COVERS_GENERATION,
    COVERS_PROMPT,
    COVERS_SINKS,
    COVERS_SPECIAL,
    E_COLUMN,
    E_COVERAGE,
    E_END,
    E_FLAGS,
    E_GATES,
    E_OP,
    E_ROW,
    E_START,
    FIRST_GATE_COLUMN,
    G_INDEX,
    G_ROW,
    G_SCOPE,
    GATE_BELOW,
    GATE_BITS,
    HELD_BACK,
    INPUT_LAYER,
    INPUT_PLAIN,
    KIND_SCOPE,
    KIND_SENSE,
    LAYER_NORM_EPS,
    MAX_GATES,
    NO_SLOT,
    NORM_CONSTANT,
    NORM_LAYER,
    NOT_COVERED,
    NOT_EDITED,
    OP_ADD,
    OP_CAP,
    OP_CLAMP,
    OP_FLOOR,
    OP_SCALE,
    P_BIAS,
    P_DECODER_SCALE,
    P_ENC_SUM,
    P_GAIN,
    P_GATE_BIAS,
    P_NORM,
    P_SINK,
    P_THRESHOLD,
    QUIET,
    REREAD,
    SCOPE_PROMPT,
    SCOPE_STOP,
    SCOPE_TOKEN,
    SILENT,
    SKIPPED_SINK,
)

_PLAIN: Final = InputNorm()


def read_gates(hidden_states: Tensor, residual: Tensor | None, buffers: Buffers) -> None:
    """Read every token's conditions at one hook point, before the edits there.

    At a special token, the sequence's first token and a sink, gate i neither has an event nor is
    quiet. Elsewhere it has an event if ``f_i > threshold_i`` (with SCOPE_PROMPT only in the prompt,
    with SCOPE_STOP only after it), and it is quiet if ``f_i <= threshold_i``. This writes the bits
    of ``gate_state.events`` beside those of other hook points, ``gate_state.first_held``, and
    ``f``.

    Args:
        hidden_states: ``[num_tokens, d_in]`` model dtype; only read.
        residual: the same shape, or None if the stream is ``hidden_states`` alone; only read.
        buffers: the buffers of this hook point.
    """
    table, state = buffers.gates, buffers.gate_state
    for t in range(hidden_states.shape[0]):
        slot = int(buffers.token_slot[t])
        if slot == NO_SLOT or not int(table.count[slot]):
            continue
        x = _stream(hidden_states, residual, t, buffers.input_norm)
        position = int(buffers.positions[t])
        if position == 0 or bool(buffers.is_special[int(buffers.input_ids[t])]):
            continue
        in_prompt = position < int(buffers.slots.prompt_len[slot])
        for i in range(int(table.count[slot])):
            ints = table.ints[slot, i]
            row, index, scope = int(ints[G_ROW]), int(ints[G_INDEX]), int(ints[G_SCOPE])
            params = buffers.rows.params[row]
            if bool(x.norm() > params[P_SINK]):
                continue
            f = activation(x, buffers.rows.W_enc[row, : len(x)], params).f
            buffers.f[t, FIRST_GATE_COLUMN + index] = f
            if bool(f <= table.threshold[slot, i]):
                state.events[t] |= 1 << (QUIET + index)
            if not bool(f > table.threshold[slot, i]):
                continue
            if in_prompt if scope == SCOPE_STOP else scope == SCOPE_PROMPT and not in_prompt:
                continue
            state.events[t] |= 1 << index
            if scope != SCOPE_TOKEN:
                state.first_held[slot, index] = min(int(state.first_held[slot, index]), position)


def read_edits(hidden_states: Tensor, residual: Tensor | None, buffers: Buffers) -> None:
    """Read the edits that are added at other hook points, and leave to these what to add.

    For each edit i that covers a token, ``carried`` becomes ``change_i * s_i * g_i`` as in
    `steer_tokens`, with ``x`` the stream here, or SKIPPED_SINK if the token is a sink here; and
    ``f`` becomes the activation if the slot reports. Conditions are looked at where the edit is
    added.

    Args:
        hidden_states: ``[num_tokens, d_in]`` model dtype; only read.
        residual: the same shape, or None if the stream is ``hidden_states`` alone; only read.
        buffers: the buffers of this hook point.
    """
    table, rows, carried = buffers.reads, buffers.rows, buffers.carried
    assert carried is not None
    for t in range(hidden_states.shape[0]):
        slot = int(buffers.token_slot[t])
        if slot == NO_SLOT or not int(table.count[slot]):
            continue
        x = _stream(hidden_states, residual, t, buffers.input_norm)
        for i in range(int(table.count[slot])):
            ints = table.ints[slot, i]
            if not covers(buffers, t, slot, ints):
                continue
            row, column = int(ints[E_ROW]), int(ints[E_COLUMN])
            params = rows.params[row]
            if bool(x.norm() > params[P_SINK]) and not int(ints[E_COVERAGE]) & COVERS_SINKS:
                carried[t, column] = SKIPPED_SINK
                continue
            read = activation(x, rows.W_enc[row, : len(x)], params)
            if bool(buffers.slots.reports[slot]):
                buffers.f[t, column] = float(read.f)
            change = edited(read.f, int(ints[E_OP]), table.value[slot, i])
            carried[t, column] = change * params[P_DECODER_SCALE] * read.g


def covers(buffers: Buffers, t: int, slot: int, ints: Tensor) -> bool:
    """Whether an edit of a slot covers its token t, before sinks and conditions are considered."""
    position = int(buffers.positions[t])
    special = position == 0 or bool(buffers.is_special[int(buffers.input_ids[t])])
    in_prompt = position < int(buffers.slots.prompt_len[slot])
    coverage = int(ints[E_COVERAGE])
    return (
        bool(coverage & (COVERS_PROMPT if in_prompt else COVERS_GENERATION))
        and (not special or bool(coverage & COVERS_SPECIAL))
        and int(ints[E_START]) <= position < int(ints[E_END])
    )


def steer_tokens(hidden_states: Tensor, residual: Tensor | None, buffers: Buffers) -> None:
    """Add each steered token's delta to ``hidden_states``, in place.

    A token has the stream ``x = hidden_states + residual``. With i over the edits that cover it,
    whose conditions hold and to which it is no sink::

        delta          = sum_i change_i * s_i * g_i * W_dec[i]
        delta          = bounded(delta)
        hidden_states += min(1, max_share * |x| / |delta|) * delta

    ``change_i`` is ``f'_i - f_i``, with ``f_i`` read from ``x``, or ``p'_i - p_i`` if the row is
    solved (see `reread`). ``s_i`` is the decoder scale; ``g_i`` is the SAE's output scale if its
    input is normalized, else 1. ``bounded`` cuts the elements of delta so that none of ``x`` and
    none of ``hidden_states`` becomes larger in size than ``limit``, unless it was so before. For an
    edit that was read at another hook point, ``change_i * s_i * g_i`` and whether the token is a
    sink are what `read_edits` left, and the activation is in ``f`` already.

    Args:
        hidden_states: ``[num_tokens, d_in]`` model dtype; rows of tokens that no edit changes stay
            as they are, bit for bit.
        residual: the same shape, or None if the stream is ``hidden_states`` alone; only read.
        buffers: the buffers of this hook point.
    """
    table, rows = buffers.table, buffers.rows
    for t in range(hidden_states.shape[0]):
        slot = int(buffers.token_slot[t])
        if slot == NO_SLOT or not int(table.count[slot]):
            continue
        x = _stream(hidden_states, residual, t)
        position = int(buffers.positions[t])
        prompt_len = int(buffers.slots.prompt_len[slot])
        reports = bool(buffers.slots.reports[slot])
        open_bits = open_gates(buffers, t, slot, position, prompt_len)
        delta = torch.zeros_like(x)
        changed = skipped = False
        for i in range(int(table.count[slot])):
            ints = table.ints[slot, i]
            covered = covers(buffers, t, slot, ints)
            row, column = int(ints[E_ROW]), int(ints[E_COLUMN])
            params = rows.params[row]
            carried = _carried(buffers, t, ints)
            read = None if carried is not None else activation(x, rows.W_enc[row, : len(x)], params)
            sink = (
                bool(x.norm() > params[P_SINK]) and not int(ints[E_COVERAGE]) & COVERS_SINKS
                if carried is None
                else bool(carried == SKIPPED_SINK)
            )
            held = not is_open(open_bits, int(ints[E_GATES]))
            if reports and not covered:
                buffers.f[t, column] = NOT_COVERED
            elif reports and (sink or held):
                buffers.f[t, column] = SKIPPED_SINK if sink else HELD_BACK
            elif reports and read is not None:
                buffers.f[t, column] = float(read.f)
            skipped |= covered and not held and sink
            if covered and not held and not sink:
                changed = True
                if carried is None:
                    assert read is not None
                    op, value = int(ints[E_OP]), table.value[slot, i]
                    change = (
                        reread(read, op, value, params[P_THRESHOLD])
                        if int(ints[E_FLAGS]) & REREAD
                        else edited(read.f, op, value)
                    )
                    carried = change * params[P_DECODER_SCALE] * read.g
                delta += carried * rows.W_dec[row, : len(x)]
        share, limited = torch.tensor(NOT_EDITED), False
        if changed:
            for before in (x, hidden_states[t].float()):
                delta = _bounded(delta, before, buffers.limit)
            share = delta.norm() / x.norm() if bool(x.norm() > 0) else torch.tensor(0.0)
            max_share = buffers.slots.max_share[slot]
            limited = bool(share > max_share)
            if limited:
                delta *= max_share / share
                share = max_share
            hidden_states[t] = (hidden_states[t].float() + delta).to(hidden_states.dtype)
        if reports:
            buffers.share[t] = -share if limited else share
        buffers.counters.add_(torch.tensor([changed, skipped], device=buffers.counters.device))


def _carried(buffers: Buffers, t: int, ints: Tensor) -> Tensor | None:
    """What the hook point that read an edit left for token t; None if it is read here."""
    if not int(ints[E_FLAGS]) & CARRIED:
        return None
    assert buffers.carried is not None
    return buffers.carried[t, int(ints[E_COLUMN])]


def open_gates(buffers: Buffers, t: int, slot: int, position: int, prompt_len: int) -> int:
    """The gates of a slot that are open at its token t, as bits."""
    state = buffers.gate_state
    events, open_bits = int(state.events[t]), 0
    for i in range(MAX_GATES):
        kind = int(state.kind[slot, i])
        below, scope = kind & KIND_SENSE == GATE_BELOW, kind // KIND_SCOPE
        if scope == SCOPE_TOKEN:
            holds = bool(events >> (QUIET + i if below else i) & 1)
        else:
            last = prompt_len - 1 if scope == SCOPE_PROMPT else position
            holds = (int(state.first_held[slot, i]) <= last) != below
        open_bits |= holds << i
    return open_bits


def is_open(open_bits: int, gates: int) -> bool:
    """Whether an edit's conditions hold: one of its gates or all, of which there may be none.

    Args:
        open_bits: the open gates, as `open_gates` returns them.
        gates: the edit's column GATES.
    """
    named = gates & GATE_BITS
    return bool(open_bits & named) if gates & ANY_GATE else open_bits & named == named


class Read(NamedTuple):
    """One latent read on one token: pre-activation, activation, and the SAE's output scale."""

    p: Tensor
    f: Tensor
    g: Tensor


def activation(x: Tensor, w_enc: Tensor, params: Tensor) -> Read:
    """Read one latent.

    Args:
        x: ``[d_in]`` float32, the stream.
        w_enc: ``[d_in]`` float32, the latent's encoder row.
        params: ``[NUM_PARAMS]`` float32, see `layout`.
    """
    z = w_enc @ x
    g = x.new_ones(())
    if int(params[P_NORM]) == NORM_LAYER:
        g = x.std()
        z = (z - x.mean() * params[P_ENC_SUM]) / (g + LAYER_NORM_EPS)
    elif int(params[P_NORM]) == NORM_CONSTANT:
        g = x.norm() / x.numel() ** 0.5
        z = z / g
    p = params[P_GAIN] * z + params[P_BIAS]
    fires = bool(p > params[P_THRESHOLD]) and bool(z + params[P_GATE_BIAS] > 0)
    return Read(p, p if fires else x.new_zeros(()), g)


def edited(f: Tensor, op: int, value: Tensor) -> Tensor:
    """``f' - f`` for one operation. ``add`` never reads ``f``."""
    return value if op == OP_ADD else applied(f, op, value) - f


def applied(f: Tensor, op: int, value: Tensor) -> Tensor:
    """``f'`` for one operation."""
    if op == OP_CLAMP:
        return value
    if op == OP_SCALE:
        return value * f
    if op == OP_ADD:
        return f + value
    if op == OP_FLOOR:
        return torch.maximum(f, value)
    assert op == OP_CAP
    return torch.minimum(f, value)


def reread(read: Read, op: int, value: Tensor, threshold: Tensor) -> Tensor:
    """``p' - p``: the pre-activation that is wanted, less the one that is there.

    p' is p if the operation changes nothing, else f' if that exceeds the threshold, else
    ``min(p, SILENT * threshold)``, so that the feature is silent.
    """
    new = applied(read.f, op, value)
    if bool(new == read.f):
        return torch.zeros_like(read.p)
    if bool(new > threshold):
        return new - read.p
    return torch.minimum(read.p, SILENT * threshold) - read.p


def _bounded(delta: Tensor, before: Tensor, limit: float) -> Tensor:
    """``delta``, cut so that no element grows beyond ``limit``, nor a larger one beyond itself."""
    after, bound = before + delta, before.abs().clamp(min=limit)
    return torch.where(after.abs() > bound, after.clamp(-bound, bound) - before, delta)


def _stream(
    hidden_states: Tensor, residual: Tensor | None, t: int, norm: InputNorm = _PLAIN
) -> Tensor:
    x = hidden_states[t].float()
    if residual is not None:
        x = x + residual[t].float()
    if norm.kind == INPUT_LAYER:
        x = x - x.mean()
    return x if norm.kind == INPUT_PLAIN else x / (x.square().mean() + norm.eps).sqrt()
