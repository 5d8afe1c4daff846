"""What a worker finds out for studies: sums over a text, and what became of another run's features.

A run that is to be compared with leaves its streams here when its results are fetched; the results
of the other run are the comparison.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from steering.request.probe_plan import PlannedCapture
from steering.worker.changes import compare
from steering.worker.kept_streams import KeptStreams
from steering.worker.record import RequestRecord
from steering.worker.residency import Residency


class StudyProbes:
    """The results of requests with probes.

    Args:
        residency: the SAEs that are read on this worker's layers.
        owned: their indices.
        device: where the model runs.
    """

    def __init__(self, residency: Residency, owned: Collection[int], device: torch.device) -> None:
        self._residency = residency
        self._owned = owned
        self._device = device
        self.kept = KeptStreams()

    def results(self, record: RequestRecord, limit: int) -> list[dict[str, Any] | None] | None:
        """What came of each of a request's probes, in plain types.

        Args:
            record: the request's, with all that its passes found.
            limit: as `RequestRecord.summary` takes it; 0 from whoever wants it forgotten.

        Returns:
            None if it has no probes. Of each `Pooled.summary`, `changes.compare`, or ``kept``, the
            tokens that were kept; None where another stage holds the layer, or if no token came.
        """
        if not record.plan.probes or not limit:
            return None
        return [
            self._result(record, i, limit) if probe.sae in self._owned else None
            for i, probe in enumerate(record.plan.probes)
        ]

    def _result(self, record: RequestRecord, probe: int, limit: int) -> dict[str, Any] | None:
        planned = record.plan.probes[probe]
        if not isinstance(planned, PlannedCapture):
            pooled = record.pools.get(probe)
            return None if pooled is None else pooled.summary()
        stream = record.streams[probe].below(limit)
        if stream is None:
            return None
        if not planned.compares:
            self.kept.keep(planned.key, planned.sae, stream)
            return {"kept": len(stream.offset)}
        unsteered = self.kept.get(planned.key, planned.sae)
        if unsteered is None:
            return {"unmatched": len(stream.offset)}
        edited = [edit.latent for edit in record.plan.edits if edit.sae == planned.sae]
        sae = self._residency.whole(planned.sae)
        return compare(unsteered, stream, sae, edited, self._device)
