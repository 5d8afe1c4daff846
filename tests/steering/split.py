"""A dictionary that reads at one place and writes at others, and streams for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sae.card import KIND_CLT, KIND_TRANSCODER
from sae.sae import SAE, LatentRows, open_sae
from sae.source import ResolvedSAE
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    OP_CLAMP,
    PlannedEdit,
)
from tests.models import D_MODEL, make_tiny_sae

EVERYWHERE = COVERS_PROMPT | COVERS_GENERATION
PROMPT, LENGTH = 6, 10
READS = "blocks.1.mlp.hook_in"
WRITES = ("blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out")
CLAMP = PlannedEdit(0, 3, OP_CLAMP, 5.0, EVERYWHERE, 0, 99)


class Transcoder(SAE):
    """An SAE's weights, read at one place and written at others, each with rows of its own."""

    def __init__(self, folder: Path, writes: Sequence[str], **options: Any) -> None:
        path = make_tiny_sae(folder, **options)
        inner = open_sae(ResolvedSAE("t", str(path), path=str(path)))
        vars(self).update(vars(inner))
        kind = KIND_TRANSCODER if len(writes) == 1 else KIND_CLT
        self._card = replace(
            inner.card,
            kind=kind,
            reads=READS,
            writes=tuple(writes),
            hook=writes[0],
            error_term=len(writes) == 1,
        )
        self.weights = {
            name: tensor.float()
            for name, tensor in load_file(path / "sae_weights.safetensors").items()
        }

    def rows(self, latents: Sequence[int], write: int = 0) -> LatentRows:
        rows = super().rows(latents)
        return replace(rows, W_dec=rows.W_dec * (write + 1) ** 2)


def streams(seed: int, hooks: int) -> list[Tensor]:
    """At so many hook points."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(LENGTH, D_MODEL, generator=rng) * 2 for _ in range(hooks)]
