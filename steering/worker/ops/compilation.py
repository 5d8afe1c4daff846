"""Compiles the entries of a batch's tokens: from the tables of their slots to tensors by token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae.arrays import BoolArray, IntArray
from steering.worker.ops.buffers import Buffers
from steering.worker.ops.compiled import (
    Carried,
    Change,
    CompiledEdits,
    CompiledGates,
    CompiledReads,
    Conditions,
    Covers,
    InputNorms,
    Latents,
    Reported,
    Rereads,
    RunRows,
)
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
    GATE_BITS,
    MAX_GATES,
    MAX_INTERVENTIONS,
    NORM_CONSTANT,
    NORM_LAYER,
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
    REREAD,
    SCOPE_PROMPT,
    SCOPE_STOP,
    SCOPE_TOKEN,
)
from steering.worker.rows import Rows
from steering.worker.slots import EditTable

#: How many elements of rows a batch may keep copied between passes, for each of the two matrices.
_GATHERED_ELEMENTS = 4 * 2**20


class _BySlot:
    """Tokens by slot: what is worked out for each distinct slot is spread over its tokens.

    Args:
        slot_np: ``[n]`` slot of each token.
        count: ``[num_slots]`` how many entries each slot has.
        width: the most entries that one of the slots has.
    """

    def __init__(self, slot_np: IntArray, count: Tensor, width: int) -> None:
        device = count.device
        slots_np, of_token_np = np.unique(slot_np, return_inverse=True)
        self.slots = torch.from_numpy(slots_np.astype(np.int64)).to(device)
        self._of_token = torch.from_numpy(of_token_np).to(device)
        self.exists = torch.arange(width, device=device) < count[self.slots][:, None]

    def spread(self, by_slot: Tensor) -> Tensor:
        return by_slot[self._of_token]

    def unless(self, trivial: Tensor, by_slot: Tensor) -> Tensor | None:
        """``by_slot`` spread over the tokens, or None if ``trivial`` holds for every entry."""
        return None if bool((trivial | ~self.exists).all()) else self.spread(by_slot)


def compile_edits(
    slot_np: IntArray,
    token_np: IntArray,
    width: int,
    buffers: Buffers,
    table: EditTable | None = None,
) -> CompiledEdits:
    """Compile the edits of tokens; this holds until one of their slots is rewritten.

    Args:
        slot_np: ``[n]`` slot of each token.
        token_np: ``[n]`` index in the batch of each token.
        width: the most edits that one of the slots has, at least 1.
        buffers: the buffers of the hook point.
        table: where the edits are; if left out, the table of the edits that are added here.
    """
    table, facts = buffers.table if table is None else table, buffers.slots
    by = _BySlot(slot_np, table.count, width)
    ints = table.ints[by.slots, :width].long()  # [slots, e, NUM_EDIT_INTS]
    coverage, op, row = ints[..., E_COVERAGE], ints[..., E_OP], ints[..., E_ROW]
    value = table.value[by.slots, :width]
    params = buffers.rows.params[row]  # [slots, e, NUM_PARAMS]
    prompt_len = facts.prompt_len[by.slots][:, None]
    low, high = window(coverage, ints[..., E_START], ints[..., E_END], prompt_len.long())
    elsewhere = ints[..., E_FLAGS] & CARRIED != 0
    # For an edit that was read elsewhere, sinks were judged there, and what was left has the scale.
    spares_none = (coverage & COVERS_SINKS != 0) | elsewhere
    sink_norm = torch.where(spares_none, torch.inf, params[..., P_SINK])
    scale = torch.where(elsewhere, 1.0, params[..., P_DECODER_SCALE])
    gates = ints[..., E_GATES]
    columns_np = table.ints_np[slot_np, :width, E_COLUMN]
    reported_np = (np.arange(width) < table.count_np[slot_np][:, None]) & facts.reports_np[slot_np][
        :, None
    ]
    report_np = np.flatnonzero(reported_np.any(axis=1))
    limited = facts.limited_np[slot_np].any()
    conditional = bool(((gates != 0) & by.exists).any())
    return CompiledEdits(
        covers=Covers(
            low=by.spread(low),
            high=by.spread(torch.where(by.exists, high, 0)),
            special=by.spread(coverage & COVERS_SPECIAL != 0),
            sink_norm=by.unless(sink_norm == torch.inf, sink_norm),
        ),
        latents=_latents(by, params, table.ints_np[slot_np, :width, E_ROW], buffers, True),
        change=_change(by, op, value),
        rereads=_rereads(by, ints[..., E_FLAGS], op, value),
        decoder_scale=by.unless(scale == 1, scale),
        max_share=by.spread(facts.max_share[by.slots]) if limited else None,
        conditions=Conditions(
            named=by.spread((gates & GATE_BITS).int()),
            one_is_enough=by.spread(gates & ANY_GATE != 0),
            slot=by.spread(by.slots),
            prompt_len=by.spread(prompt_len),
        )
        if conditional
        else None,
        carried=_carried(by, elsewhere, token_np, columns_np),
        reported=_reported(token_np, columns_np, reported_np, buffers.f)
        if len(report_np)
        else None,
        shares=Reported(
            torch.from_numpy(report_np).to(value.device),
            torch.from_numpy(token_np[report_np].astype(np.int64)).to(value.device),
        )
        if len(report_np)
        else None,
    )


def compile_reads(
    slot_np: IntArray, token_np: IntArray, width: int, buffers: Buffers
) -> CompiledReads:
    """Compile the edits that are read here and added elsewhere; arguments as `compile_edits`."""
    table = buffers.reads
    assert buffers.carried is not None
    exists_np = np.arange(width) < table.count_np[slot_np][:, None]
    columns_np = table.ints_np[slot_np, :width, E_COLUMN]
    return CompiledReads(
        edits=compile_edits(slot_np, token_np, width, buffers, table),
        into=_reported(token_np, columns_np, exists_np, buffers.carried),
    )


def compile_gates(
    slot_np: IntArray, token_np: IntArray, width: int, buffers: Buffers
) -> CompiledGates:
    """Compile the conditions that are read here; arguments as `compile_edits`."""
    table = buffers.gates
    by = _BySlot(slot_np, table.count, width)
    ints = table.ints[by.slots, :width].long()
    scope, index = ints[..., G_SCOPE], ints[..., G_INDEX]
    params = buffers.rows.params[ints[..., G_ROW]]
    prompt_len = buffers.slots.prompt_len[by.slots].long()[:, None]
    everywhere = torch.iinfo(torch.int64).max
    exists_np = np.arange(width) < table.count_np[slot_np][:, None]
    columns_np = FIRST_GATE_COLUMN + table.ints_np[slot_np, :width, G_INDEX]
    return CompiledGates(
        latents=_latents(by, params, table.ints_np[slot_np, :width, G_ROW], buffers, False),
        exists=by.spread(by.exists),
        sink_norm=by.unless(params[..., P_SINK] == torch.inf, params[..., P_SINK]),
        threshold=by.spread(table.threshold[by.slots, :width]),
        index=by.spread(index.int()),
        low=by.spread(torch.where(scope == SCOPE_STOP, prompt_len, 0)),
        high=by.spread(torch.where(scope == SCOPE_PROMPT, prompt_len, everywhere)),
        state=by.spread(by.slots[:, None] * MAX_GATES + index),
        kept=by.spread(scope != SCOPE_TOKEN),
        f=_reported(token_np, columns_np, exists_np, buffers.f),
    )


def window(
    coverage: Tensor, start: Tensor, end: Tensor, prompt_len: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions ``[low, high)`` that an edit or a read covers, but for special tokens and sinks.

    A token's phase is its position against the prompt's length, so phases and window together are
    one interval.

    Args:
        coverage: bits ``COVERS_*``, int64.
        start: the first position of the window, int64.
        end: one past its last position, int64.
        prompt_len: length of the prompt; like the others broadcast to one shape.

    Returns:
        ``low`` and ``high``, int64.
    """
    low = torch.where(coverage & COVERS_PROMPT != 0, start, torch.maximum(start, prompt_len))
    high = torch.where(coverage & COVERS_GENERATION != 0, end, torch.minimum(end, prompt_len))
    return low, high


def _latents(
    by: _BySlot, params: Tensor, row_np: IntArray, buffers: Buffers, writes: bool
) -> Latents:
    norm, gate_bias = params[..., P_NORM], params[..., P_GATE_BIAS]
    layer, constant = (norm == NORM_LAYER) & by.exists, (norm == NORM_CONSTANT) & by.exists
    return Latents(
        gain=by.spread(params[..., P_GAIN]),
        bias=by.spread(params[..., P_BIAS]),
        threshold=by.spread(params[..., P_THRESHOLD]),
        gate_bias=by.unless(gate_bias == torch.inf, gate_bias),
        zero=params.new_zeros(()),
        norms=InputNorms(by.spread(layer), by.spread(constant), by.spread(params[..., P_ENC_SUM]))
        if bool((layer | constant).any())
        else None,
        rows=_run_rows(row_np, buffers.rows, writes),
    )


def _change(by: _BySlot, op: Tensor, value: Tensor) -> Change:
    is_floor, is_cap = op == OP_FLOOR, op == OP_CAP
    unbounded = ~(is_floor | is_cap)
    return Change(
        factor=by.spread(
            torch.where(op == OP_ADD, 0.0, torch.where(op == OP_SCALE, value - 1, -1.0))
        ),
        offset=by.spread(torch.where(op == OP_SCALE, 0.0, value)),
        least=by.unless(unbounded, torch.where(is_floor, 0.0, -torch.inf)),
        most=by.unless(unbounded, torch.where(is_cap, 0.0, torch.inf)),
    )


def _rereads(by: _BySlot, flags: Tensor, op: Tensor, value: Tensor) -> Rereads | None:
    solved = by.unless(flags & REREAD == 0, flags & REREAD != 0)
    if solved is None:
        return None
    factor = torch.where(op == OP_CLAMP, 0.0, torch.where(op == OP_SCALE, value, 1.0))
    offset = torch.where((op == OP_CLAMP) | (op == OP_ADD), value, 0.0)
    return Rereads(
        solved=solved,
        factor=by.spread(factor),
        offset=by.spread(offset),
        least=by.spread(torch.where(op == OP_FLOOR, value, -torch.inf)),
        most=by.spread(torch.where(op == OP_CAP, value, torch.inf)),
    )


def _carried(
    by: _BySlot, elsewhere: Tensor, token_np: IntArray, columns_np: IntArray
) -> Carried | None:
    found = by.unless(~elsewhere, elsewhere)
    if found is None:
        return None
    index_np = token_np[:, None].astype(np.int64) * MAX_INTERVENTIONS + columns_np
    index = torch.from_numpy(index_np).to(found.device)
    return Carried(found, torch.where(found, index, 0))


def _reported(
    token_np: IntArray, columns_np: IntArray, reported_np: BoolArray, into: Tensor
) -> Reported:
    device = into.device
    target_np = token_np[:, None].astype(np.int64) * into.shape[1] + columns_np
    return Reported(
        torch.from_numpy(np.flatnonzero(reported_np)).to(device),
        torch.from_numpy(target_np[reported_np]).to(device),
    )


def _run_rows(row_np: IntArray, pool: Rows, writes: bool) -> RunRows:
    """Rows by run: neighbouring tokens that name the same rows in the same order make one run.

    Columns past a slot's entries name row 0 in the table, which has no effect, since no entry is
    there.
    """
    starts = np.flatnonzero(np.concatenate([[True], (row_np[1:] != row_np[:-1]).any(axis=1)]))
    stops = np.append(starts[1:], len(row_np))
    row = torch.from_numpy(row_np[starts].astype(np.int64)).to(pool.W_enc.device)
    fits = row.numel() * pool.W_enc.shape[1] <= _GATHERED_ELEMENTS
    return RunRows(
        bounds=list(zip(starts.tolist(), stops.tolist(), strict=True)),
        row=row,
        W_enc=pool.W_enc[row] if fits else None,
        W_dec=pool.W_dec[row] if fits and writes else None,
    )
