"""Texts that run through a tiny worker for a study, beside SAEs of several kinds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.sae import SAE, open_sae
from sae.source import ResolvedSAE
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    PlannedEdit,
    SteeringPlan,
)
from steering.request.probe_plan import PlannedPool, Window
from tests.engine.reference import ReferenceSAE
from tests.models import D_MODEL, make_tiny_sae
from tests.steering.tiny_worker import tied_sae

PROMPT, LENGTH = 5, 12
EVERYWHERE = COVERS_PROMPT | COVERS_GENERATION
ALL = Window(EVERYWHERE, 0, LENGTH)


@dataclass(frozen=True)
class Opened:
    """An SAE, and an independent one of the same files."""

    sae: SAE
    reference: ReferenceSAE

    @property
    def d_sae(self) -> int:
        return self.sae.card.d_sae


def opened(path: Path, name: str, sink_norm: float | None = None) -> Opened:
    ref = ResolvedSAE(name, str(path), path=str(path), sink_norm=sink_norm)
    return Opened(open_sae(ref), ReferenceSAE(path, sink_norm))


def three_saes(folder: Path) -> list[Opened]:
    """JumpReLU at layer 1, TopK at layer 2, and there one whose input is normalized."""
    tied_sae(folder / "jumprelu", layer=1)
    make_tiny_sae(folder / "topk", architecture="topk", layer=2, seed=5, k=24)
    make_tiny_sae(
        folder / "normed",
        layer=2,
        seed=6,
        config={"normalize_activations": "layer_norm"},
        threshold=0.2,
    )
    return [opened(folder / name, name) for name in ("jumprelu", "topk", "normed")]


def plan(key: str, *probes: Any, edits: tuple[PlannedEdit, ...] = (), **more: Any) -> SteeringPlan:
    made = SteeringPlan(key, 1, PROMPT, edits, True, False, None, probes=probes)
    return replace(made, **more)


def pool(sae: int = 0, kind: str = "mean", **more: Any) -> PlannedPool:
    return replace(PlannedPool(sae, (ALL,), kind, scaled=False, peaks=False), **more)


def streams(seed: int, length: int = LENGTH) -> list[Tensor]:
    """At layers 1 and 2."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(length, D_MODEL, generator=rng) * 2 for _ in range(2)]


def in_parts(*bounds: int) -> list[tuple[int, int]]:
    return list(pairwise(bounds))
