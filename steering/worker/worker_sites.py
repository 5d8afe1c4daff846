"""The hook points that one worker holds, and what they share: made once, when the model is loaded.

They share the rows of the features in use and the memory that a pass works in. None of it moves,
since CUDA graphs hold its addresses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import torch

from sae.card import HEADS, HookPoint
from sae.sae import SAE
from steering.request.limits import MAX_INTERVENTIONS
from steering.worker.gates import GateState, GateTable
from steering.worker.ops.buffers import Buffers, InputNorm, Kernel
from steering.worker.ops.layout import MAX_ENTRIES
from steering.worker.pass_reports import PassReports
from steering.worker.residency import Residency
from steering.worker.rows import RowPool
from steering.worker.site import SharedHeads, Site
from steering.worker.slots import EditTable, SlotFacts
from steering.worker.step import Step
from steering.worker.whole_outputs import WholeOutputs

#: Token ids past the vocabulary that a runner may still see: multimodal models put placeholders
#: of images and sound there.
SPARE_TOKEN_IDS: Final = 1024


class WorkerSites:
    """Every hook point of one worker, and what they share.

    Args:
        saes: every served SAE, in the order of the configuration; an SAE's index is its identity.
        owned: hook points whose layer this worker holds (all but under pipeline parallelism).
        num_slots: how many requests run at once at most.
        max_rows: capacity of the row pool.
        d_in: hidden size of the model.
        step: the token buffers of the pass.
        special_token_ids: tokens that edits leave alone by default.
        vocab_size: size of the token table.
        device: where the model runs.
        kernel: serves the passes in which rows alone are enough; None if no kernel runs.
        graphs: whether CUDA graphs hold the op, so that it is launched in idle passes too.
        resident: see `Residency`.
        limit: see `layout.FLOAT16_LIMIT`; infinite for streams of other dtypes.
        input_norms: the norms of those hook points that follow one, by hook point.
        heads: how tensor-parallel ranks share attention's heads, for the hook points there; None if
            every rank has all heads.

    Attributes:
        saes, num_slots, step, device, graphs: as given.
        always_launch: whether the op is launched in passes that no request needs it for.
        max_num_tokens: tokens of the largest pass.
        by_hook: a hook point's name to its site, in the order of ``owned``.
        rows: the rows of the features in use.
        residency: where whole weights are; it holds the SAEs that are read at ``owned``.
        reports: what sites copy of a pass, on its way to the records.
        outputs: what SAEs that write elsewhere made of the tokens of the pass.
        facts: what holds for each slot's request at every hook point.
        gate_state: what is known of each slot's conditions.
        f: ``[max_num_tokens, MAX_ENTRIES]`` float32, activations of the pass; see `Buffers.f`.
        share: ``[max_num_tokens, hook points]`` float32, shares of the pass; see `Buffers.share`.
        token_counts: ``[2]`` int64, see `Buffers.counters`.
    """

    def __init__(
        self,
        saes: Sequence[SAE],
        owned: Sequence[HookPoint],
        *,
        num_slots: int,
        max_rows: int,
        d_in: int,
        step: Step,
        special_token_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
        kernel: Kernel | None,
        graphs: bool,
        resident: str | None = None,
        limit: float = math.inf,
        input_norms: Mapping[str, InputNorm] = MappingProxyType({}),
        heads: SharedHeads | None = None,
    ) -> None:
        self.saes = saes
        self.num_slots = num_slots
        self.step = step
        self.device = device
        self.graphs = graphs
        self.always_launch = kernel is not None and graphs
        self._d_in = d_in
        self._kernel = kernel
        self._limit = limit
        self._input_norms = input_norms
        self._heads = heads
        widths = [width for sae in saes for width in (sae.card.d_in, sae.card.d_out)]
        self.rows = RowPool(saes, max_rows, max([d_in, *widths]), device)
        self.reports = PassReports()
        self.outputs = WholeOutputs()
        self.facts = SlotFacts(num_slots, device)
        self.max_num_tokens = max_num_tokens = len(step.token_slot)
        self.gate_state = GateState(num_slots, max_num_tokens, device)
        # One buffer for all hook points: an edit and a gate have columns of their own.
        self.f = torch.zeros(max_num_tokens, MAX_ENTRIES, dtype=torch.float32, device=device)
        self.share = torch.zeros(max_num_tokens, max(len(owned), 1), device=device)
        self.token_counts = torch.zeros(2, dtype=torch.int64, device=device)
        split = any(not sae.card.one_place for sae in saes)
        self._carried = (
            torch.zeros(max_num_tokens, MAX_INTERVENTIONS, dtype=torch.float32, device=device)
            if split
            else None
        )
        is_special = torch.zeros(vocab_size + SPARE_TOKEN_IDS, dtype=torch.bool)
        is_special[[t for t in special_token_ids if t < len(is_special)]] = True
        self._is_special = is_special.to(device)
        places = {str(point) for point in owned}
        self.residency = Residency(
            {i: sae for i, sae in enumerate(saes) if sae.card.reads in places}, device, resident
        )
        self.by_hook = {
            str(point): self._site(str(point), column) for column, point in enumerate(owned)
        }

    def _site(self, hook: str, column: int) -> Site:
        reading = {i: sae for i, sae in enumerate(self.saes) if sae.card.reads == hook}
        writing = {i: sae for i, sae in enumerate(self.saes) if hook in sae.card.writes}
        buffers = self._buffers(hook, column, reading, writing)
        return Site(
            hook,
            reading,
            writing,
            buffers,
            self.residency,
            self.reports,
            self.outputs,
            None if self._kernel is None else self._kernel.bound(buffers),
            self.always_launch,
            self._heads if HookPoint.parse(hook).kind == HEADS else None,
        )

    def _buffers(
        self, hook: str, column: int, reading: Mapping[int, SAE], writing: Mapping[int, SAE]
    ) -> Buffers:
        num_slots, device = self.num_slots, self.device
        split = any(not sae.card.one_place for sae in (*reading.values(), *writing.values()))
        return Buffers(
            token_slot=self.step.token_slot,
            positions=self.step.positions,
            input_ids=self.step.input_ids,
            is_special=self._is_special,
            slots=self.facts,
            table=EditTable(num_slots, device),
            reads=EditTable(num_slots, device),
            gates=GateTable(num_slots, device),
            gate_state=self.gate_state,
            rows=self.rows.columns(0, self._width(reading, writing)),
            f=self.f,
            share=self.share[:, column],
            carried=self._carried if split else None,
            counters=self.token_counts,
            limit=self._limit,
            input_norm=self._input_norms.get(hook, InputNorm()),
        )

    def _width(self, reading: Mapping[int, SAE], writing: Mapping[int, SAE]) -> int:
        """How many elements a token's stream has where these SAEs read and write."""
        widths = {sae.card.d_in for sae in reading.values()}
        widths |= {sae.card.d_out for sae in writing.values()}
        assert len(widths) <= 1, widths
        return widths.pop() if widths else self._d_in
