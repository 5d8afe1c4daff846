"""When an SAE's weights are put on the device whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from steering.worker.residency import Residency

DEVICE = torch.device("meta")


class Weights:
    """An SAE that notes where it was put."""

    def __init__(self, matrix_bytes: int) -> None:
        self.matrix_bytes = matrix_bytes
        self.put_on: list[torch.device] = []

    def resident(self, device: torch.device) -> None:
        self.put_on.append(device)


def residency(saes: Any, free: SimpleNamespace | None) -> Residency:
    return Residency(dict(enumerate(saes)), DEVICE, None if free is None else lambda: free.bytes)


def test_weights_that_fit_half_of_what_is_free_are_put_on_the_device_once() -> None:
    small, large = Weights(50), Weights(51)
    free = SimpleNamespace(bytes=100)
    kept = residency([small, large], free)
    for index in (0, 1, 0):
        kept.bring(index)
    assert (small.put_on, large.put_on) == ([DEVICE], [])


def test_what_did_not_fit_is_not_tried_in_every_request() -> None:
    weights = Weights(60)
    free = SimpleNamespace(bytes=100)
    kept = residency([weights], free)
    kept.bring(0)
    free.bytes = 1000
    kept.bring(0)
    assert weights.put_on == []


def test_on_the_host_they_stay_in_the_memory_map() -> None:
    weights = Weights(1)
    residency([weights], None).bring(0)
    assert weights.put_on == []
