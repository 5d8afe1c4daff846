"""What a worker finds out for studies: sums over a text, and how features changed between runs.

A run whose streams are to be compared leaves them here when its results are fetched. It makes no
difference which run is done first; whoever wants them compared asks when both are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steering.request.probe_plan import PlannedStream
from steering.worker.changes import compare
from steering.worker.kept_streams import KeptStreams
from steering.worker.record import RequestRecord
from steering.worker.residency import Residency


class StudyProbes:
    """The results of requests with probes.

    Args:
        residency: the SAEs that are read on this worker's layers.
        device: where the model runs.

    Attributes:
        kept: the streams of runs that are to be compared.
    """

    def __init__(self, residency: Residency, device: torch.device) -> None:
        self._residency = residency
        self._device = device
        self.kept = KeptStreams()

    def results(self, record: RequestRecord, limit: int) -> list[dict[str, Any] | None] | None:
        """What came of each of a request's probes, in plain types.

        Args:
            record: the request's record, with all that its passes found.
            limit: as `RequestRecord.summary` takes it; 0 if the record is only to be forgotten.

        Returns:
            For each probe that sums up, `Pooled.summary`; for each that keeps the stream, ``kept``:
            how many tokens are kept. An entry is None if another pipeline stage holds the layer, or
            if no token took part. None instead of the list if the limit is 0.
        """
        if not limit:
            return None
        return [
            self._result(record, i, limit) if probe.sae in self._residency.saes else None
            for i, probe in enumerate(record.plan.probes)
        ]

    def _result(self, record: RequestRecord, probe: int, limit: int) -> dict[str, Any] | None:
        planned = record.plan.probes[probe]
        if not isinstance(planned, PlannedStream):
            pooled = record.pools.get(probe)
            return None if pooled is None else pooled.summary()
        stream = record.streams[probe].below(limit)
        if stream is None:
            return None
        self.kept.keep(planned.key, planned.sae, stream)
        return {"kept": len(stream.offset)}

    def compare(
        self, unsteered: str, steered: str, saes: Sequence[int], start: int, stop: int
    ) -> list[dict[str, Any] | None]:
        """Compare two runs' features, in plain types.

        Args:
            unsteered: key of the run to compare with.
            steered: key of the other run.
            saes: indices of the SAEs.
            start: the first of the steered run's kept tokens to compare.
            stop: one past the last.

        Returns:
            For each SAE what `changes.compare` returns; None if nothing is kept of one of the runs.
        """
        found: list[dict[str, Any] | None] = []
        for sae in saes:
            streams = self.kept.get(unsteered, sae), self.kept.get(steered, sae)
            if streams[0] is None or streams[1] is None:
                found.append(None)
                continue
            whole = self._residency.whole(sae)
            found.append(compare(streams[0], streams[1], whole, start, stop, self._device))
        return found
