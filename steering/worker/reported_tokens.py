"""Which tokens of a pass are recorded, and the one copy of what was found on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae.arrays import IntArray
from steering.worker.pass_reports import PassReports
from steering.worker.record import RequestRecord
from steering.worker.slots import to_device
from steering.worker.step import Step

_NOBODY = -1


class ReportedTokens:
    """The slots that report, each with its record.

    Args:
        num_slots: how many slots there are.
        f: ``[max_num_tokens, MAX_ENTRIES]`` float32, where passes write activations.
        share: ``[max_num_tokens, hook points]`` float32, where passes write shares.
    """

    def __init__(self, num_slots: int, f: Tensor, share: Tensor) -> None:
        self._f, self._share = f, share
        self._record_np = np.full(num_slots, _NOBODY, dtype=np.int64)
        self._width: dict[int, int] = {}  # how many edits each slot that reports has
        # The slot of each token of the last pass, with what was worked out for them.
        self._laid_out: tuple[IntArray, Tensor, IntArray, int] | None = None

    def write(self, slot: int, record: RequestRecord | None) -> None:
        """Rewrite a slot with the record that it reports to; None if it does not report."""
        self._laid_out = None
        self._record_np[slot] = _NOBODY if record is None else record.number
        self._width.pop(slot, None)
        if record is not None and record.plan.edits:
            self._width[slot] = len(record.plan.edits)

    def collect(self, step: Step, reports: PassReports) -> None:
        """Start copying what a pass found on its tokens, once the pass is over."""
        if not self._width:
            return
        widths = [self._width.get(int(slot), 0) for slot in step.slots_np]
        if not any(widths):
            return
        if self._laid_out is None or self._laid_out[0] is not step.token_slot_np:
            # NO_SLOT takes the last slot's number here, and is left out below.
            number_np = self._record_np[step.token_slot_np]
            token_np = np.flatnonzero((number_np != _NOBODY) & (step.token_slot_np >= 0))
            self._laid_out = (
                step.token_slot_np,
                to_device(torch.from_numpy(token_np), self._f.device),
                number_np[token_np],
                max(widths),
            )
        _, index, record_np, width = self._laid_out
        reports.copy(
            RequestRecord.put_edits,
            record_np,
            step.positions[index],
            self._f[index, :width],
            self._share[index],
        )
