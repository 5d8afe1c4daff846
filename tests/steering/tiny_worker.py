"""A worker's steering state without vLLM: passes over requests whose streams are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sae.card import HookPoint
from sae.pass_order import place_in_pass
from sae.sae import SAE, open_sae
from sae.source import ResolvedSAE
from steering.worker.ops.buffers import Kernel
from steering.worker.step import Step
from steering.worker.worker_sites import WorkerSites
from steering.worker.worker_state import SteeringState
from tests.models import D_MODEL, make_tiny_sae

SPECIAL = 0
ORDINARY = 10


def tied_sae(folder: Path, architecture: str = "jumprelu", layer: int = 1, seed: int = 0) -> SAE:
    """A tiny SAE whose encoder rows nearly are its decoder rows, as trained ones' are."""
    path = make_tiny_sae(folder, architecture=architecture, layer=layer, seed=seed)
    file = path / "sae_weights.safetensors"
    tensors = load_file(file)
    noise = torch.randn(tensors["W_enc"].shape, generator=torch.Generator().manual_seed(seed + 1))
    W_enc = tensors["W_dec"].T + 0.5 * nn.functional.normalize(noise, dim=0)
    save_file({**tensors, "W_enc": 0.8 * W_enc.contiguous()}, file)
    return open_sae(ResolvedSAE(f"l{layer}", str(path), path=str(path)))


class TinyWorker:
    """The state, the buffers that a runner would own, and the streams of its requests.

    Args:
        saes: whatever reads and writes; `hooks` has their hook points in the order of a pass.
        kernel: None for torch.
        slots: requests that run at once.
        max_tokens: of a pass.
        device: where the streams are.
        resident: see `Residency`.
    """

    def __init__(
        self,
        saes: Sequence[SAE],
        kernel: Kernel | None,
        *,
        slots: int = 3,
        max_tokens: int = 64,
        device: str = "cpu",
        resident: str | None = None,
    ) -> None:
        self.device = device
        self.positions = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.input_ids = torch.full((max_tokens,), ORDINARY, dtype=torch.int32, device=device)
        places = {hook for sae in saes for hook in (sae.card.reads, *sae.card.writes)}
        self.hooks = sorted(places, key=place_in_pass)
        sites = WorkerSites(
            saes,
            [HookPoint.parse(hook) for hook in self.hooks],
            num_slots=slots,
            max_rows=256,
            d_in=D_MODEL,
            step=Step(max_tokens, self.positions, self.input_ids, device),
            special_token_ids=[SPECIAL],
            vocab_size=100,
            device=torch.device(device),
            kernel=kernel,
            graphs=False,
            resident=resident,
        )
        self.state = SteeringState(sites, record=True)

    def forward(
        self,
        parts: Sequence[tuple[str, int, int]],
        streams: Mapping[str, Sequence[Tensor]],
        ids: Mapping[str, Sequence[int]] | None = None,
    ) -> list[list[Tensor]]:
        """One pass.

        Args:
            parts: ``(request, first position, one past the last)`` in the batch's order.
            streams: of each request at each hook point, ``[length, d_in]``.
            ids: tokens of each request; ordinary ones if left out.

        Returns:
            what the hook points made of each part's stream: ``[part][hook point]``.
        """
        starts = np.cumsum([0, *(stop - start for _, start, stop in parts)])
        for (req_id, start, stop), at in zip(parts, starts.tolist(), strict=False):
            here = slice(at, at + stop - start)
            self.positions[here] = torch.arange(start, stop)
            self.input_ids[here] = ORDINARY
            if ids is not None:
                self.input_ids[here] = torch.tensor(ids[req_id][start:stop], dtype=torch.int32)
        self.state.begin_step([req_id for req_id, _, _ in parts], starts)
        made = []
        for i, hook in enumerate(self.hooks):
            hidden = torch.cat([streams[req][i][start:stop] for req, start, stop in parts])
            on_device = hidden.to(self.device)
            self.state.apply_at(hook, on_device, None)
            made.append(torch.split(on_device.cpu(), np.diff(starts).tolist()))
        self.state.end_step()
        return [list(of_part) for of_part in zip(*made, strict=True)]
