"""Conditions and edits of one token, spelled out: what every other version must agree with."""

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

    A special token, the sequence's first and a sink have no event and are not quiet either. Else
    gate i has its event where ``f_i > threshold_i``, and is quiet where ``f_i <= threshold_i``;
    with SCOPE_PROMPT only in the prompt, with SCOPE_STOP only behind it. Written are the bits of
    ``gate_state.events`` (added to those of other hook points), ``gate_state.first_held``, and f.

    Args:
        hidden_states: ``[num_tokens, d_in]`` model dtype; only read.
        residual: the same shape, or None where the layer returns the sum; only read.
        buffers: of this hook point.
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
    """Read the edits that are added at other hook points, and leave there what they add.

    For each edit that covers a token, ``carried`` becomes ``change_i * s_i * g_i`` as in
    `steer_tokens`, of what stands here, or SKIPPED_SINK where that is a sink; and f its activation,
    if the slot reports. Conditions are looked at where the edit is added.

    Args:
        hidden_states: ``[num_tokens, d_in]`` model dtype; only read.
        residual: the same shape, or None where the layer returns the sum; only read.
        buffers: of this hook point.
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
    """Whether an edit of a slot applies to its token t, sinks and conditions apart."""
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

    For a token with stream ``x = hidden_states + residual`` and the edits i that cover it and whose
    conditions hold: ``hidden_states += m * sum_i change_i * s_i * g_i * W_dec[i]``. ``change_i`` is
    ``f'_i - f_i`` with ``f_i`` read from ``x``, or, where the row is solved for what is read again,
    ``p'_i - p_i`` (see `reread`); ``s_i`` is the decoder scale, ``g_i`` the SAE's output scale
    where its input is normalized, and m at most 1, such that the whole is no more than
    ``max_share`` of the norm of ``x``. Before that an element of the sum is cut such that the one
    of ``x`` becomes no larger than ``limit``, if it was not larger; nor does that of
    ``hidden_states``. Of an edit that was read elsewhere the product of the three is what
    `read_edits` left; its activation is in f already, and whether the token is a sink is what was
    found there.

    Args:
        hidden_states: ``[num_tokens, d_in]`` model dtype; rows that no edit touches stay as they
            are, bit for bit.
        residual: the same shape, or None where the layer returns the sum; only read.
        buffers: of this hook point.
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
        touched = skipped = False
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
                touched = True
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
        if touched:
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
        buffers.counters.add_(torch.tensor([touched, skipped], device=buffers.counters.device))


def _carried(buffers: Buffers, t: int, ints: Tensor) -> Tensor | None:
    """What was left where an edit of token t was read; None of one that is read here."""
    if not int(ints[E_FLAGS]) & CARRIED:
        return None
    assert buffers.carried is not None
    return buffers.carried[t, int(ints[E_COLUMN])]


def open_gates(buffers: Buffers, t: int, slot: int, position: int, prompt_len: int) -> int:
    """Bits of the slot's gates that are open at a token."""
    state = buffers.gate_state
    events, open_bits = int(state.events[t]), 0
    for i in range(MAX_GATES):
        kind = int(state.kind[slot, i])
        below, scope = kind & KIND_SENSE == GATE_BELOW, kind // KIND_SCOPE
        if scope == SCOPE_TOKEN:
            is_it = bool(events >> (QUIET + i if below else i) & 1)
        else:
            last = prompt_len - 1 if scope == SCOPE_PROMPT else position
            is_it = (int(state.first_held[slot, i]) <= last) != below
        open_bits |= is_it << i
    return open_bits


def is_open(open_bits: int, gates: int) -> bool:
    """Whether an edit's conditions hold: any of its gates, or all, be they none."""
    named = gates & GATE_BITS
    return bool(open_bits & named) if gates & ANY_GATE else open_bits & named == named


class Read(NamedTuple):
    """One latent on one token: pre-activation, activation, and the SAE's output scale."""

    p: Tensor
    f: Tensor
    g: Tensor


def activation(x: Tensor, w_enc: Tensor, params: Tensor) -> Read:
    """Read one latent from ``x`` ``[d_in]``."""
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

    p' is p where the operation changes nothing; f' where that exceeds the threshold; else silent:
    at most 0.9 of the threshold.
    """
    new = applied(read.f, op, value)
    if bool(new == read.f):
        return torch.zeros_like(read.p)
    if bool(new > threshold):
        return new - read.p
    return torch.minimum(read.p, SILENT * threshold) - read.p


def _bounded(delta: Tensor, before: Tensor, limit: float) -> Tensor:
    """``delta``, less where an element would become larger than ``limit`` and than it was."""
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
