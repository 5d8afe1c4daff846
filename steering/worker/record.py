"""What a worker remembers of one request that asked for a report or a read, until it is fetched.

Everything is kept by token position, so a position counts once however often it is computed
(preemption, rejected speculative tokens), and whatever lies past the last token that counts is cut
off when the record is fetched.
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
    """What was found for one request, or for one of its choices if it has several, by position.

    Args:
        plan: what the request asks for.
        child: which of the choices of ``n > 1`` this is, else 0.
        columns: indices of the edits that are made on this worker, ascending.
        hooks: ``(name, column of the buffer of shares)`` of the hook points where they are made.

    Attributes:
        number: identifies the record within this process.
        columns: as given if the request asked for a report, else empty.
        hooks: as given if the request asked for a report, else empty.
        top: the strongest features of each token; None if they were not asked for.
        totals: figures over all tokens; None until the first token comes.
        fit: how well the SAE fits; None except in a self-check.
        pools: sums by the index of the plan's probe, made when its first token comes.
        streams: kept streams by the index of the plan's probe.
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
            f: ``[n, > max(columns)]`` activations before the edits, or markers, by index of the
                edit in the request.
            share: ``[n, hook points]`` shares, or markers, by the worker's hook points.
        """
        self._edits.put(positions, f[:, self.columns], share[:, self._hook_columns])

    def put_reads(
        self, positions: IntArray, covered: BoolArray, latents: IntArray, values: FloatArray
    ) -> None:
        """Add tokens of a pass; arguments as those of `TopFeatures.put`."""
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
        """Add tokens of a pass.

        Args:
            positions: ``[n]``.
            probe: ``[n]`` index of the plan's probe that each row is for.
            covered: ``[n]``, see `StreamRows.put`; likewise ``x`` and ``asked``.
        """
        for i in np.unique(probe).tolist():
            rows = probe == i
            self.streams[i].put(positions[rows], covered[rows], x[rows], asked[rows])

    def pooled(self, probe: int, card: SAECard, device: torch.device) -> Pooled:
        """Where the activations of the plan's probe with this index are summed up."""
        if probe not in self.pools:
            planned = self.plan.probes[probe]
            assert isinstance(planned, PlannedPool)
            self.pools[probe] = Pooled(planned, card.d_sae, device, signed=card.signed)
        return self.pools[probe]

    def put_stop(self, position: int, gate: int, activation: float) -> None:
        """Note that a ``stop_when`` fired at a position.

        With asynchronous scheduling a further pass, which does not count, may find another.

        Args:
            position: where it fired.
            gate: index of the plan's gate.
            activation: the feature's activation there.
        """
        self._stops[position] = gate, activation

    def summary(self, limit: int) -> dict[str, Any]:
        """What was recorded at positions below ``limit``, in plain types.

        Returns:
            ``child``; ``cached``, how many tokens of the prompt no pass of this request computed,
            None if nothing was recorded for the prompt; ``edits``, one entry for each edit, None if
            another worker holds its layer or no token was recorded; ``edited``, one entry for each
            hook point where a token was edited; ``stopped``, what fired at the last of the
            positions, or None; ``read``, which `features_read` unpacks; ``aggregate``, see
            `Totals.summary`; ``measured``, see `Fit.summary`.
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
    """What the report says of each edit, from activations or markers ``[n, e]``."""
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
    """What the report says of each hook point, from shares or markers ``[n, hooks]``."""
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
    """The value, or None for infinity and NaN: a float16 stream may reach them, JSON cannot."""
    return value if np.isfinite(value) else None
