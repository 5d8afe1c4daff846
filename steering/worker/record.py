"""What a worker remembers of one request that asked for a report or a read, until it is fetched.

Everything is kept by token position, so a position counts once however often it is computed
(chunked prefill, preemption, rejected speculative tokens), and whatever lies past the last token
that counts is cut off when the record is fetched.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from sae.arrays import BoolArray, FloatArray, IntArray
from sae.card import SAECard
from steering.request.plan import SteeringPlan
from steering.request.probe_plan import PlannedPool, PlannedStream
from steering.worker.kept_streams import StreamRows
from steering.worker.ops.layout import HELD_BACK, NOT_EDITED, SKIPPED_SINK
from steering.worker.pooled import Pooled
from steering.worker.probes import Fit, TopFeatures, Totals
from steering.worker.rows_by_position import RowsByPosition

#: Host memory of an empty record, roughly.
_EMPTY_BYTES: Final = 512

_numbers = itertools.count()


class RequestRecord:
    """One request's (or one child's) activations before its edits, by position.

    Attributes:
        number: names the record within this process.
        columns: the request's edits whose activations this worker sees, ascending.
        hooks: ``(name, column of the shares)`` of the hook points where they are made.
        top: the strongest features of each token; None if they were not asked for.
        totals: figures over all tokens, made when the first token comes.
        fit: how well the SAE fits; None but in a self-check.
        pools: by the index of the plan's probe, made when the first token comes.
        streams: by the index of the plan's probe.
    """

    def __init__(
        self,
        plan: SteeringPlan,
        child: int,
        columns: Sequence[int] = (),
        hooks: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.number = next(_numbers)
        self.plan = plan
        self.child = child
        self.columns = np.array(columns if plan.report else (), dtype=np.int64)
        self.hooks = tuple(hooks) if plan.report else ()
        self._hook_columns = np.array([column for _, column in self.hooks], dtype=np.int64)
        self._edits = RowsByPosition()
        read = plan.read
        self.fit = Fit() if read is not None and read.fit else None
        self.top = (
            TopFeatures(read.top_k, stream=read.stream)
            if read is not None and not read.fit
            else None
        )
        self.totals: Totals | None = None
        self._stops: dict[int, tuple[int, float]] = {}
        self.pools: dict[int, Pooled] = {}
        self.streams = {
            i: StreamRows(
                plan.prompt_len,
                tuple(edit.latent for edit in plan.edits if edit.sae == probe.sae),
            )
            for i, probe in enumerate(plan.probes)
            if isinstance(probe, PlannedStream)
        }

    @property
    def nbytes(self) -> int:
        """Memory held, roughly."""
        probes = (self.top, self.totals, self.fit, *self.pools.values(), *self.streams.values())
        held = sum(probe.nbytes for probe in probes if probe is not None)
        return self._edits.nbytes + held + _EMPTY_BYTES

    def put_edits(self, positions: IntArray, f: FloatArray, share: FloatArray) -> None:
        """Add tokens of a pass.

        Args:
            positions: ``[n]``.
            f: ``[n, > max(columns)]`` activations before the edit or markers, by the request's
                edits.
            share: ``[n, hook points]`` shares or markers, by the worker's hook points.
        """
        self._edits.put(positions, f[:, self.columns], share[:, self._hook_columns])

    def put_reads(
        self, positions: IntArray, covered: BoolArray, latents: IntArray, values: FloatArray
    ) -> None:
        """Add tokens of a pass, as `TopFeatures.put` takes them."""
        if self.top is not None:
            self.top.put(positions, covered, latents, values)

    def put_stream(
        self,
        positions: IntArray,
        probe: IntArray,
        covered: BoolArray,
        x: FloatArray,
        asked: FloatArray,
    ) -> None:
        """Add tokens of a pass: ``[n]`` which of the plan's probes, then as `StreamRows.put`."""
        for i in np.unique(probe).tolist():
            here = probe == i
            self.streams[i].put(positions[here], covered[here], x[here], asked[here])

    def pooled(self, probe: int, card: SAECard, device: torch.device) -> Pooled:
        """Where a probe's activations are summed up."""
        if probe not in self.pools:
            planned = self.plan.probes[probe]
            assert isinstance(planned, PlannedPool)
            self.pools[probe] = Pooled(planned, card.d_sae, device, signed=card.signed)
        return self.pools[probe]

    def put_stop(self, position: int, gate: int, activation: float) -> None:
        """A ``stop_when`` fired at a position; ``gate`` is which of the plan's.

        With asynchronous scheduling the pass behind the last one may find another.
        """
        self._stops[position] = gate, activation

    def summary(self, limit: int) -> dict[str, Any]:
        """What was recorded on positions below ``limit``, in plain types.

        ``edits`` has one entry an edit, None where this worker does not hold its layer; ``edited``
        one entry for each hook point where a token was edited; ``read`` is for `features_read`;
        ``stopped`` says what fired at the last of them, if anything did;
        ``cached`` counts the prompt's tokens that no pass of this request computed, None where none
        is known.
        """
        positions, columns = self._edits.latest()
        counted = positions < limit
        num_edits = len(self.plan.edits) if self.plan.report else 0
        edits: list[dict[str, Any] | None] = [None] * num_edits
        edited: list[dict[str, Any]] = []
        if counted.any():
            f, share = (column[counted] for column in columns)
            for index, counts in zip(self.columns.tolist(), _counts(f), strict=True):
                if not self.plan.edits[index].gates:
                    del counts["tokens_held_back"]
                edits[index] = counts
            edited = _shares([name for name, _ in self.hooks], share)
        computed = int((positions < self.plan.prompt_len).sum())
        return {
            "child": self.child,
            "cached": self.plan.prompt_len - computed if computed else None,
            "edits": edits,
            "edited": edited,
            "stopped": self._stop_at(limit - 1),
            "read": None if self.top is None else self.top.summary(limit),
            "aggregate": None if self.totals is None else self.totals.summary(limit),
            "measured": None if self.fit is None else self.fit.summary(limit),
        }

    def _stop_at(self, position: int) -> dict[str, Any] | None:
        stop = self._stops.get(position)
        if stop is None:
            return None
        gate, activation = stop
        return {"gate": gate, "position": position, "activation": _finite(activation)}


def _counts(f: FloatArray) -> list[dict[str, Any]]:
    """What the report says of each edit, of activations or markers ``[n, e]``."""
    skipped, held = f == np.float32(SKIPPED_SINK), f == np.float32(HELD_BACK)
    edited = ~(np.isnan(f) | skipped | held)
    total = np.where(edited, f, 0).sum(axis=0, dtype=np.float64)
    largest = np.where(edited, f, -np.inf).max(axis=0, initial=-np.inf)
    columns = zip(
        edited.sum(axis=0).tolist(),
        skipped.sum(axis=0).tolist(),
        held.sum(axis=0).tolist(),
        (edited & (f > 0)).sum(axis=0).tolist(),
        total.tolist(),
        largest.tolist(),
        strict=True,
    )
    return [
        {
            "tokens_edited": n,
            "tokens_skipped": sinks,
            "tokens_held_back": held_back,
            "tokens_active": active,
            "mean_activation": _finite(sum_ / n) if n else None,
            "max_activation": _finite(max_) if n else None,
        }
        for n, sinks, held_back, active, sum_, max_ in columns
    ]


def _shares(hooks: Sequence[str], share: FloatArray) -> list[dict[str, Any]]:
    """What the report says of each hook point, of shares or markers ``[n, hooks]``."""
    found = []
    for hook, column in zip(hooks, share.T, strict=True):
        edited = column[column != NOT_EDITED]
        if not edited.size:
            continue
        size = np.abs(edited)
        found.append(
            {
                "hook": hook,
                "tokens": int(edited.size),
                "mean_share": _finite(float(size.mean(dtype=np.float64))),
                "max_share": _finite(float(size.max())),
                "tokens_limited": int((edited < 0).sum()),
            }
        )
    return found


def _finite(value: float) -> float | None:
    """JSON has no infinity, which a stream in float16 may reach."""
    return value if np.isfinite(value) else None
