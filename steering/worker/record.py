"""What workers remember of requests that asked for a report or a read, until it is fetched.

Everything is kept by token position, so a position counts once however often it is computed
(chunked prefill, preemption, rejected speculative tokens), and whatever lies past the last token
that counts is cut off when the record is fetched.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sae.arrays import FloatArray, IntArray
from sae.self_check import Observed
from steering.request.plan import SteeringPlan

#: Records of ended requests that nobody need fetch are forgotten beyond these bounds.
MAX_FINISHED_RECORDS: Final = 4096
MAX_FINISHED_BYTES: Final = 256 * 2**20

_NOT_SEEN, _NOT_COVERED, _COVERED, _SKIPPED = range(4)

BoolArray = npt.NDArray[np.bool_]


class RequestRecord:
    """One request's (or one child's) activations before its edits, by position."""

    def __init__(self, plan: SteeringPlan, child: int) -> None:
        self.plan = plan
        self.child = child
        num_edits = len(plan.edits) if plan.report else 0
        self._status = np.zeros((0, num_edits), dtype=np.uint8)
        self._f = np.zeros((0, num_edits), dtype=np.float32)
        top_k = plan.read.top_k if plan.read is not None else 0
        self._was_read = np.zeros(0, dtype=np.bool_)
        self._top_latents = np.zeros((0, top_k), dtype=np.int32)
        self._top_values = np.zeros((0, top_k), dtype=np.float32)
        self._end = 0  # one past the last position
        self._totals: Aggregate | None = None
        self._observed: Observed | None = None

    @property
    def nbytes(self) -> int:
        """Host memory held, roughly."""
        totals = 0 if self._totals is None else self._totals.nbytes
        observed = 0 if self._observed is None else self._observed.nbytes
        return (
            self._status.nbytes
            + self._f.nbytes
            + self._top_latents.nbytes
            + self._top_values.nbytes
            + totals
            + observed
            + 512
        )

    def put_edits(
        self,
        columns: list[int],
        positions: IntArray,
        f: FloatArray,
        covered: BoolArray,
        skipped: BoolArray,
    ) -> None:
        """Record edits ``columns`` (indices in the request) on tokens.

        Args:
            columns: which edits the last axes belong to.
            positions: ``[n]``.
            f: ``[n, len(columns)]`` activations before the edit.
            covered: ``[n, len(columns)]``.
            skipped: ``[n, len(columns)]``.
        """
        self._grow(int(positions.max()) + 1)
        where = np.ix_(positions, np.asarray(columns))
        self._f[where] = f
        status = np.where(covered, _COVERED, np.where(skipped, _SKIPPED, _NOT_COVERED))
        self._status[where] = status

    def put_read(self, positions: IntArray, latents: IntArray, values: FloatArray) -> None:
        """Record the strongest features: ``[n]``, ``[n, top_k]``, ``[n, top_k]``."""
        self._grow(int(positions.max()) + 1)
        k = latents.shape[1]
        self._was_read[positions] = True
        self._top_latents[positions, :k] = latents
        self._top_values[positions, :k] = values

    def forget_reads(self, positions: IntArray) -> None:
        """These are computed anew: where one was rejected, a token may stand that is not read."""
        self._was_read[positions[positions < len(self._was_read)]] = False

    def totals(self, d_sae: int) -> Aggregate:
        """The running totals over the text, made when first needed."""
        if self._totals is None:
            self._totals = Aggregate(d_sae)
        return self._totals

    def observed(self) -> Observed:
        """The tokens on which the SAE is checked, made when first needed."""
        if self._observed is None:
            self._observed = Observed()
        return self._observed

    def summary(self, limit: int) -> dict[str, Any]:
        """What was recorded on positions below ``limit``, in plain types.

        ``edits`` has one entry an edit, None where this worker does not hold its layer; ``read`` is
        for `steering.report.features_read`; ``cached`` counts the prompt's tokens that no pass of
        this request computed, None where none is known.
        """
        edits: list[dict[str, Any] | None] = []
        for column in range(self._status.shape[1]):
            status, f = self._status[:limit, column], self._f[:limit, column]
            if not status.any():
                edits.append(None)
                continue
            seen = f[status == _COVERED]
            edits.append(
                {
                    "tokens_edited": int(seen.size),
                    "tokens_skipped": int((status == _SKIPPED).sum()),
                    "tokens_active": int((seen > 0).sum()),
                    "mean_activation": _finite(seen.mean(dtype=np.float64)) if seen.size else None,
                    "max_activation": _finite(seen.max()) if seen.size else None,
                }
            )
        read = None
        if self._was_read.any():
            # Lists of a million numbers would hold up the worker, and with it everybody's tokens.
            where = np.flatnonzero(self._was_read[:limit])
            read = [
                where.astype(np.int64).tobytes(),
                self._top_latents[where].tobytes(),
                self._top_values[where].tobytes(),
            ]
        plan = self.plan.read
        aggregate = None
        if self._totals is not None and plan is not None and plan.aggregate is not None:
            aggregate = self._totals.strongest(plan.aggregate, plan.top_k)
        measured = None if self._observed is None else asdict(self._observed.measured(limit))
        computed = int(self._status[: self.plan.prompt_len].any(axis=1).sum())
        return {
            "child": self.child,
            "cached": self.plan.prompt_len - computed if computed else None,
            "edits": edits,
            "read": read,
            "aggregate": aggregate,
            "measured": measured,
        }

    def trim(self) -> None:
        """Give back the room for positions that never came."""
        end = self._end
        self._status, self._f = self._status[:end].copy(), self._f[:end].copy()
        self._was_read = self._was_read[:end].copy()
        self._top_latents = self._top_latents[:end].copy()
        self._top_values = self._top_values[:end].copy()

    def _grow(self, length: int) -> None:
        self._end = max(self._end, length)
        have = self._status.shape[0]
        if length <= have:
            return
        length = max(length, 2 * have, 64)

        def grown(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            new = np.zeros((length, *array.shape[1:]), dtype=array.dtype)
            new[:have] = array
            return new

        self._status, self._f = grown(self._status), grown(self._f)
        self._was_read = grown(self._was_read)
        self._top_latents, self._top_values = grown(self._top_latents), grown(self._top_values)


def _finite(value: np.floating[Any]) -> float | None:
    """JSON has no infinity, which a stream in float16 may reach."""
    return float(value) if np.isfinite(value) else None


class Aggregate:
    """Maximum, sum and count of every latent over a text, but for activations that are not finite.

    Attributes:
        maximum: ``[d_sae]`` largest activation.
        total: ``[d_sae]`` float64 sum of activations.
        count: ``[d_sae]`` tokens on which the latent was active.
        num_tokens: tokens seen.
        counted_to: positions below this one are in already.
    """

    def __init__(self, d_sae: int) -> None:
        self.maximum = np.zeros(d_sae, dtype=np.float32)
        self.total = np.zeros(d_sae, dtype=np.float64)
        self.count = np.zeros(d_sae, dtype=np.int64)
        self.num_tokens = 0
        self.counted_to = 0

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return self.maximum.nbytes + self.total.nbytes + self.count.nbytes

    def add(self, f: FloatArray) -> None:
        """Add tokens' activations ``[n, d_sae]``."""
        # JSON has no infinity, and a single one would stay in the sum of the whole text.
        f = np.where(np.isfinite(f), f, np.float32(0))
        np.maximum(self.maximum, f.max(axis=0), out=self.maximum)
        self.total += f.sum(axis=0, dtype=np.float64)
        self.count += (f > 0).sum(axis=0)
        self.num_tokens += f.shape[0]

    def strongest(self, aggregate: str, top_k: int) -> list[list[float]]:
        """``[latent, score]`` of the ``top_k`` best, best first, ties by lower index."""
        tokens = max(self.num_tokens, 1)
        scores: dict[str, npt.NDArray[Any]] = {
            "max": self.maximum,
            "mean": self.total / tokens,
            "frequency": self.count / tokens,
        }
        score = scores[aggregate]
        best = np.argsort(-score, kind="stable")[:top_k]
        return [[int(i), float(score[i])] for i in best if score[i] > 0]


class RecordStore:
    """Records of requests that run or are preempted, and of ended ones until they are fetched.

    Those of ended requests that nobody need fetch are forgotten, oldest first, beyond
    `MAX_FINISHED_RECORDS` or `MAX_FINISHED_BYTES`.
    """

    def __init__(self) -> None:
        self._running: dict[str, RequestRecord] = {}
        self._paused: dict[str, RequestRecord] = {}
        self._awaited: dict[tuple[str, int], RequestRecord] = {}
        self._finished: OrderedDict[tuple[str, int], RequestRecord] = OrderedDict()
        self._finished_bytes = 0

    def open(self, req_id: str, plan: SteeringPlan, child: int) -> RequestRecord:
        """The record of a request that starts, or of one that resumes after preemption."""
        record = self._paused.pop(req_id, None) or RequestRecord(plan, child)
        self._running[req_id] = record
        return record

    def pause(self, req_id: str) -> None:
        """The request was preempted; what was recorded waits for it."""
        if (record := self._running.pop(req_id, None)) is not None:
            self._paused[req_id] = record

    def close(self, req_id: str) -> None:
        """The request ended; what was recorded waits to be fetched."""
        record = self._running.pop(req_id, None) or self._paused.pop(req_id, None)
        if record is None:
            return
        record.trim()
        key = record.plan.key, record.child
        if record.plan.awaited:
            self._awaited[key] = record
            return
        self._pop_finished(key)
        self._finished[key] = record
        self._finished_bytes += record.nbytes
        while (
            len(self._finished) > MAX_FINISHED_RECORDS or self._finished_bytes > MAX_FINISHED_BYTES
        ):
            self._pop_finished(next(iter(self._finished)))

    def take(self, key: str, child: int) -> RequestRecord | None:
        """Fetch and forget one record, whether its request has left the batch yet or not."""
        for records in (self._running, self._paused):
            for req_id, record in records.items():
                if (record.plan.key, record.child) == (key, child):
                    del records[req_id]
                    return record
        return self._awaited.pop((key, child), None) or self._pop_finished((key, child))

    @property
    def clients(self) -> int:
        """Records that some client may fetch: all but those of self-checks."""
        return sum(not record.plan.is_self_check for record in self._all())

    def __len__(self) -> int:
        return sum(1 for _ in self._all())

    def _all(self) -> Iterator[RequestRecord]:
        for records in (self._running, self._paused, self._awaited, self._finished):
            yield from records.values()

    def _pop_finished(self, key: tuple[str, int]) -> RequestRecord | None:
        record = self._finished.pop(key, None)
        if record is not None:
            self._finished_bytes -= record.nbytes
        return record
