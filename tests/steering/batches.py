"""Batches of tokens with edit tables, for every version of the edit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steering.request.limits import MAX_GATES, MAX_INTERVENTIONS, POSITION_LIMIT
from steering.request.plan import COVERS_SINKS, SCOPE_STOP, PlannedEdit, PlannedGate
from steering.worker.gates import GateState, GateTable
from steering.worker.ops.buffers import Buffers, InputNorm
from steering.worker.ops.layout import (
    FLOAT16_LIMIT,
    MAX_ENTRIES,
    NEVER,
    NO_SLOT,
    NORM_CONSTANT,
    NORM_LAYER,
    NORM_NONE,
    P_BIAS,
    P_DECODER_SCALE,
    P_ENC_SUM,
    P_GAIN,
    P_GATE_BIAS,
    P_NORM,
    P_SINK,
    P_THRESHOLD,
    SKIPPED_SINK,
)
from steering.worker.rows import RowPool
from steering.worker.slots import EditTable, SlotFacts

VOCAB = 32
SPECIAL_IDS = (0, 1, 2)
#: What buffers hold before: whatever nobody writes still does afterwards.
UNWRITTEN = 7.0

#: Column of the first edit that is read here and added elsewhere: any that the others leave free.
FIRST_ELSEWHERE = 20

#: Options of a batch whose requests have unequal lengths, one of them none, all of them edits.
RAGGED: dict[str, Any] = {"tokens": (3, 0, 2, 1), "steered": 1, "max_edits": 7, "max_gates": 3}


@dataclass(frozen=True)
class Gates:
    """One request's conditions, all read at this hook point; a gate's latent is its pool row.

    Attributes:
        gates: the request's.
        first_held: the first position with an event of each, as passes before found.
    """

    gates: Sequence[PlannedGate] = ()
    first_held: Sequence[int] = ()


@dataclass
class Batch:
    """A pass over one hook point; an edit's latent is its pool row.

    Attributes:
        edits: slot to its edits.
        gates: slot to its conditions.
        reread: slots whose rows are taken to be solved.
        max_share: slot to the largest share that it may change.
        elsewhere: slot to its edits that are read here and added elsewhere, by their index.
        was_read: slot to the indices of those of its edits that were read elsewhere.
        carried: ``[num_tokens, MAX_INTERVENTIONS]`` what was left where edits were read.
        input_norm: of the hook point.
    """

    hidden_states: Tensor
    residual: Tensor | None
    token_slot: Tensor
    positions: Tensor
    input_ids: Tensor
    is_special: Tensor
    prompt_len: Tensor
    rows: RowPool
    reports: Tensor
    edits: Mapping[int, Sequence[PlannedEdit]]
    gates: Mapping[int, Gates] = field(default_factory=dict)
    reread: frozenset[int] = frozenset()
    max_share: Mapping[int, float] = field(default_factory=dict)
    elsewhere: Mapping[int, Mapping[int, PlannedEdit]] = field(default_factory=dict)
    was_read: Mapping[int, frozenset[int]] = field(default_factory=dict)
    carried: Tensor | None = None
    input_norm: InputNorm = field(default_factory=InputNorm)

    @property
    def num_tokens(self) -> int:
        """Tokens, padding included."""
        return self.hidden_states.shape[0]

    def buffers(self) -> Buffers:
        """All that a version of the edit works on beside the stream, on the batch's device."""
        num_slots, device = self.prompt_len.shape[0], self.hidden_states.device
        slots, table = SlotFacts(num_slots, device), EditTable(num_slots, device)
        reads, gate_table = EditTable(num_slots, device), GateTable(num_slots, device)
        state = GateState(num_slots, self.num_tokens, device)
        for slot in range(num_slots):
            reports = bool(self.reports[slot])
            slots.write(slot, int(self.prompt_len[slot]), self.max_share.get(slot), reports)
            edits, gates = self.edits.get(slot, ()), self.gates.get(slot, Gates())
            table.write(
                slot,
                list(enumerate(edits)),
                [edit.latent for edit in edits],
                reread=slot in self.reread,
                carried=self.was_read.get(slot, ()),
            )
            elsewhere = self.elsewhere.get(slot, {})
            reads.write(slot, [*elsewhere.items()], [e.latent for e in elsewhere.values()])
            rows = [gate.latent for gate in gates.gates]
            gate_table.write(slot, list(enumerate(gates.gates)), rows)
            held = [*gates.first_held, *[NEVER] * (MAX_GATES - len(gates.first_held))]
            first_held = torch.tensor(held, dtype=torch.int32)
            state.write(slot, gates.gates, first_held)
        return Buffers(
            self.token_slot,
            self.positions,
            self.input_ids,
            self.is_special,
            slots,
            table,
            reads,
            gate_table,
            state,
            self.rows,
            f=torch.full((self.num_tokens, MAX_ENTRIES), UNWRITTEN, device=device),
            # A column among others, as it is one of several hook points.
            share=torch.full((self.num_tokens, 2), UNWRITTEN, device=device)[:, 1],
            carried=None if self.carried is None else self.carried.clone(),
            counters=torch.zeros(2, dtype=torch.int64, device=device),
            limit=FLOAT16_LIMIT if self.hidden_states.dtype == torch.float16 else math.inf,
            input_norm=self.input_norm,
        )

    def on(self, device: str) -> Batch:
        """A copy on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, copy=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        rows = pool(self.rows.W_enc, self.rows.W_dec, self.rows.params, device)
        return replace(self, rows=rows, **moved)


def pool(w_enc: Tensor, w_dec: Tensor, params: Tensor, device: str = "cpu") -> RowPool:
    """A pool that holds these rows: ``[n, d_in]`` twice and ``[n, NUM_PARAMS]``."""
    rows = RowPool([], w_enc.shape[0], w_enc.shape[1], device)
    for target, source in ((rows.W_enc, w_enc), (rows.W_dec, w_dec), (rows.params, params)):
        target.copy_(source)
    rows.params[:, P_ENC_SUM] = rows.W_enc.sum(dim=1)
    return rows


def plain_params(n: int) -> Tensor:
    """Parameters of ``n`` ReLU latents without a bias, and no sinks."""
    params = torch.zeros(n, RowPool([], n, 1, "cpu").params.shape[1])
    params[:, P_GAIN] = params[:, P_DECODER_SCALE] = 1
    params[:, P_GATE_BIAS] = params[:, P_SINK] = torch.inf
    return params


def edit(
    row: int,
    op: int,
    value: float,
    coverage: int,
    start: int = 0,
    end: int = POSITION_LIMIT,
    gates: int = 0,
    any_gate: bool = False,
) -> PlannedEdit:
    """One edit of the latent in ``row``."""
    return PlannedEdit(0, row, op, value, coverage, start, end, gates, any_gate)


def one_request(
    x: Tensor,
    edits: Sequence[PlannedEdit],
    rows: RowPool,
    *,
    first: int = 5,
    prompt_len: int = 8,
    input_ids: Sequence[int] | None = None,
    reports: bool = True,
    gates: Gates | None = None,
    reread: bool = False,
    max_share: float | None = None,
) -> Batch:
    """The tokens of one request from position ``first``; the layer returns the whole stream."""
    n = x.shape[0]
    return Batch(
        hidden_states=x,
        residual=None,
        token_slot=torch.zeros(n, dtype=torch.int32),
        positions=torch.arange(first, first + n),
        input_ids=torch.tensor([10] * n if input_ids is None else input_ids, dtype=torch.int32),
        is_special=_is_special(),
        prompt_len=torch.tensor([prompt_len], dtype=torch.int32),
        rows=rows,
        reports=torch.tensor([int(reports)], dtype=torch.int32),
        edits={0: edits},
        gates={} if gates is None else {0: gates},
        reread=frozenset({0} if reread else ()),
        max_share={} if max_share is None else {0: max_share},
    )


def random_batch(
    seed: int,
    *,
    d_in: int = 24,
    dtype: torch.dtype = torch.float32,
    residual: bool = True,
    tokens: Sequence[int] = (2, 1, 0, 2),
    steered: float = 0.7,
    max_edits: int = 5,
    max_gates: int = 0,
    padding: int = 1,
) -> Batch:
    """Requests with random slots, phases, edits, kinds of latents, and some outsized tokens.

    Args:
        seed: of everything random.
        d_in: width of the stream.
        dtype: of the stream.
        residual: whether the layer returns its output and the residual apart.
        tokens: of each request, in the batch's order.
        steered: probability that a request has a slot.
        max_edits: most edits of a slot; the fewest are none.
        max_gates: most conditions of a slot; with any, some rows are taken to be solved, too, and
            some slots may change only a share of the stream.
        padding: tokens past the real ones; their ids and positions are garbage.
    """
    rng = torch.Generator().manual_seed(seed)

    def randint(low: int, high: int, n: int = 1) -> list[int]:
        found: list[int] = torch.randint(low, high, (n,), generator=rng).tolist()
        return found

    def chance(n: int, probability: float) -> Tensor:
        return torch.rand(n, generator=rng) < probability

    num_slots = len(tokens) + 1
    slots = torch.randperm(num_slots, generator=rng)[: len(tokens)].int()
    slots[~chance(len(tokens), steered)] = NO_SLOT
    first = torch.tensor(randint(0, 4, len(tokens)))
    positions = torch.cat(
        [torch.arange(int(f), int(f) + n) for f, n in zip(first, tokens, strict=True)]
    )
    real = len(positions)
    num_tokens = real + padding
    token_slot = torch.full((num_tokens,), NO_SLOT, dtype=torch.int32)
    token_slot[:real] = torch.repeat_interleave(slots, torch.tensor(tokens))
    hidden = torch.randn(num_tokens, d_in, generator=rng)
    hidden[chance(num_tokens, 0.2)] *= 20
    capacity = max(2 * max_edits, 1)
    edits, gates = {}, {}
    for slot in slots.tolist():
        if slot == NO_SLOT:
            continue
        num_gates = randint(0, max_gates + 1)[0]
        edits[slot] = [
            edit(
                row,
                randint(0, 5)[0],
                float(torch.randn(1, generator=rng)) * 3,
                randint(1, 2 * COVERS_SINKS)[0],
                start=randint(0, 3)[0],
                end=[POSITION_LIMIT, 4][randint(0, 2)[0]],
                gates=randint(0, 2**num_gates)[0] if num_gates else 0,
                any_gate=bool(num_gates and randint(0, 2)[0]),
            )
            for row in randint(0, capacity, randint(0, max_edits + 1)[0])
        ]
        edits[slot] = [replace(e, any_gate=e.any_gate and e.gates > 0) for e in edits[slot]]
        gates[slot] = Gates(
            [
                PlannedGate(0, row, kind % 2, 0.5 * value, scope)
                for row, kind, value, scope in zip(
                    randint(0, capacity, num_gates),
                    randint(0, 2, num_gates),
                    randint(0, 3, num_gates),
                    randint(0, SCOPE_STOP + 1, num_gates),
                    strict=True,
                )
            ],
            [[NEVER, 0, 2][pick] for pick in randint(0, 3, num_gates)],
        )
    picks = randint(0, 3, num_slots) if max_gates else [2] * num_slots
    return Batch(
        hidden_states=hidden.to(dtype),
        residual=torch.randn(num_tokens, d_in, generator=rng).to(dtype) if residual else None,
        token_slot=token_slot,
        positions=torch.cat([positions, torch.full((padding,), 2**40)]),
        input_ids=torch.tensor(randint(0, VOCAB, real) + [2**30] * padding, dtype=torch.int32),
        is_special=_is_special(),
        prompt_len=torch.tensor(randint(1, 5, num_slots), dtype=torch.int32),
        rows=_random_rows(rng, capacity, d_in),
        reports=chance(num_slots, 0.5).int(),
        edits=edits,
        gates=gates if max_gates else {},
        reread=frozenset(slot for slot, pick in enumerate(picks) if pick == 0),
        max_share={slot: 0.3 for slot, pick in enumerate(picks) if pick == 1},
    )


def split_batch(seed: int, *, norm: InputNorm | None = None, **options: Any) -> Batch:
    """A random batch in which some edits were read elsewhere, and others are read for elsewhere.

    Behind an input norm nothing is added.
    """
    batch = random_batch(seed, **options)
    rng = torch.Generator().manual_seed(seed)
    shape = (batch.num_tokens, MAX_INTERVENTIONS)
    carried = torch.randn(shape, generator=rng)
    carried[torch.rand(shape, generator=rng) < 0.3] = SKIPPED_SINK
    elsewhere = {
        slot: {FIRST_ELSEWHERE + i: each for i, each in enumerate(reversed(edits))}
        for slot, edits in batch.edits.items()
        if edits and torch.rand((), generator=rng) < 0.7
    }
    was_read = {
        slot: frozenset(i for i in range(len(edits)) if torch.rand((), generator=rng) < 0.5)
        for slot, edits in batch.edits.items()
        if slot not in batch.reread
    }
    batch = replace(batch, elsewhere=elsewhere, was_read=was_read, carried=carried)
    return batch if norm is None else replace(batch, edits={}, input_norm=norm)


def full_batch(seed: int, d_in: int, dtype: torch.dtype, tokens: int) -> Batch:
    """One request of ``tokens`` tokens with MAX_INTERVENTIONS edits."""
    batch = random_batch(seed, d_in=d_in, dtype=dtype, tokens=(tokens,), steered=1, max_edits=64)
    [slot] = batch.edits
    rng = torch.Generator().manual_seed(seed)
    ops = torch.randint(0, 5, (MAX_INTERVENTIONS,), generator=rng).tolist()
    edits = [edit(row, op, 1.5, coverage=7) for row, op in enumerate(ops)]
    return replace(batch, edits={slot: edits})


def _random_rows(rng: torch.Generator, n: int, d_in: int) -> RowPool:
    params = plain_params(n)
    pick = torch.rand(n, generator=rng)
    params[:, P_BIAS] = torch.randn(n, generator=rng) * 0.3
    params[:, P_GAIN] = torch.rand(n, generator=rng) + 0.5
    params[:, P_THRESHOLD] = torch.where(pick < 0.5, 0.4, 0.0)
    params[pick > 0.7, P_GATE_BIAS] = 0.1
    params[:, P_DECODER_SCALE] = torch.rand(n, generator=rng) + 0.5
    # Streams have norm near sqrt(2 d_in), or 20 times that.
    params[torch.rand(n, generator=rng) < 0.5, P_SINK] = 5 * d_in**0.5
    kinds = torch.tensor([NORM_NONE, NORM_NONE, NORM_LAYER, NORM_CONSTANT])
    params[:, P_NORM] = kinds[torch.randint(0, 4, (n,), generator=rng)].float()
    return pool(
        torch.randn(n, d_in, generator=rng) / d_in**0.5,
        torch.randn(n, d_in, generator=rng) / d_in**0.5,
        params,
    )


def _is_special() -> Tensor:
    is_special = torch.zeros(VOCAB, dtype=torch.bool)
    is_special[list(SPECIAL_IDS)] = True
    return is_special
