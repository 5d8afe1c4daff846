"""What a pass may observe of an SAE beside the edits: a small class each.

A probe belongs to one request's record. It is given the tokens of a pass that its read covers, and
says at the end what it saw of the positions that count. Everything is kept by position where a
position may be computed more than once.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.arrays import BoolArray, FloatArray, IntArray
from sae.self_check import Observed
from steering.worker.rows_by_position import RowsByPosition


def strongest(f: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest positive activations of each token, best first, ties by lower index.

    On a CPU, where it costs nothing to ask whether there are ties, most tokens have none.

    Args:
        f: ``[n, d_sae]`` float32 activations.
        k: how many.

    Returns:
        latents int32 and values float32, ``[n, min(k, d_sae)]``; if fewer are positive, the rest
        are zeros.
    """
    if f.device.type != "cpu":
        return strongest_in_one(f, k)
    values, latents = f.topk(min(k + 1, f.shape[1]), dim=1)  # one more: what the last may tie with
    is_nan = values[:, 0].isnan()  # the largest of all to `topk`, and no activation
    ties = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > 0)
    values, latents = values[:, :k], torch.where(values > 0, latents, 0)[:, :k].int()
    values = torch.where(values > 0, values, 0.0)
    odd = (ties.any(dim=1) | is_nan).nonzero()[:, 0]
    if len(odd):
        latents[odd], values[odd] = strongest_in_one(f[odd], k)
    return latents, values


def strongest_in_one(f: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`strongest`, of value and index ranked as one number: the device is asked nothing."""
    d_sae = f.shape[1]
    # The bits of floats that are not negative are ordered as they are.
    bits = torch.where(f > 0, f, 0.0).view(torch.int32).long()
    last = torch.arange(d_sae - 1, -1, -1, device=f.device)
    best = ((bits << 32) | last).topk(min(k, d_sae), dim=1).values
    values = (best >> 32).int().view(torch.float32)
    latents = (d_sae - 1 - (best & 0xFFFFFFFF)).int()
    return torch.where(values > 0, latents, 0), values


class TopFeatures:
    """The strongest features of each token; `strongest` ranks those of all requests at once."""

    def __init__(self, top_k: int, *, stream: bool = False) -> None:
        self._top_k = top_k
        self._rows = RowsByPosition()
        self._unsent: list[tuple[IntArray, BoolArray, IntArray, FloatArray]] | None = (
            [] if stream else None
        )

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return self._rows.nbytes

    def put(
        self, positions: IntArray, covered: BoolArray, latents: IntArray, values: FloatArray
    ) -> None:
        """Add tokens of a pass.

        Args:
            positions: ``[n]``.
            covered: ``[n]``; one that is not, where another was before, takes its place: a token
                that was rejected is not read.
            latents: ``[n, >= top_k]`` best first.
            values: ``[n, >= top_k]``.
        """
        row = covered, latents[:, : self._top_k], values[:, : self._top_k]
        self._rows.put(positions, *row)
        if self._unsent is not None:
            self._unsent.append((positions, *row))

    def unsent(self) -> tuple[IntArray, BoolArray, IntArray, FloatArray] | None:
        """What was put since the last call, in that order; None if nothing was."""
        if not self._unsent:
            return None
        parts, self._unsent = self._unsent, []
        positions, covered, latents, values = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        return positions, covered, latents, values

    def summary(self, limit: int) -> list[bytes] | None:
        """Positions below ``limit`` for `features_read`; None if nothing was ever read.

        Lists of a million numbers would hold up the worker, and with it everybody's tokens.
        """
        positions, columns = self._rows.latest()
        if not len(positions):
            return None
        covered, latents, values = columns
        kept = covered & (positions < limit)
        return [
            positions[kept].astype(np.int64).tobytes(),
            latents[kept].astype(np.int32).tobytes(),
            values[kept].astype(np.float32).tobytes(),
        ]


class Totals:
    """Maximum, sum and count of every latent over a text, but for activations that are not finite.

    They stay on the device until they are asked for. A position counts when it is first observed.

    Attributes:
        maximum: ``[d_sae]`` float32, largest activation.
        total: ``[d_sae]`` float64, sum of activations.
        count: ``[d_sae]`` int64, tokens on which the latent was active.
        num_tokens: ``[]`` int64, tokens seen.
    """

    def __init__(self, aggregate: str, top_k: int, d_sae: int, device: torch.device | str) -> None:
        self._aggregate, self._top_k = aggregate, top_k
        self.maximum = torch.zeros(d_sae, dtype=torch.float32, device=device)
        self.total = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.count = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._counted_to = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Memory held, on the device."""
        return self.maximum.nbytes + self.total.nbytes + self.count.nbytes

    def observe(self, positions: Tensor, covered: Tensor, f: Tensor) -> None:
        """Add tokens of a pass: ``[n]``, ``[n]`` bool, ``[n, d_sae]`` activations."""
        fresh = covered & (positions >= self._counted_to)
        # JSON has no infinity, and a single one would stay in the sum of the whole text.
        f = torch.where(fresh[:, None] & f.isfinite(), f, 0.0)
        torch.maximum(self.maximum, f.amax(dim=0), out=self.maximum)
        self.total += f.sum(dim=0, dtype=torch.float64)
        self.count += (f > 0).sum(dim=0)
        self.num_tokens += fresh.sum()
        self._counted_to = torch.maximum(
            self._counted_to, torch.where(covered, positions + 1, 0).amax()
        )

    def summary(self, limit: int) -> list[list[float]]:
        """``[latent, score]`` of the best, best first, ties by lower index.

        Args:
            limit: not looked at: what is aggregated is a prompt, and all of it counts.
        """
        tokens = max(int(self.num_tokens), 1)
        score = {
            "max": self.maximum.double(),
            "mean": self.total / tokens,
            "frequency": self.count.double() / tokens,
        }[self._aggregate]
        best = score.sort(descending=True, stable=True).indices[: self._top_k]
        return [[i, s] for i, s in zip(best.tolist(), score[best].tolist(), strict=True) if s > 0]


class Fit:
    """How well the SAE reconstructs the tokens: what a self-check measures."""

    def __init__(self) -> None:
        self._observed = Observed()

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return self._observed.nbytes

    def observe(
        self, positions: Tensor, covered: Tensor, x: Tensor, x_hat: Tensor, l0: Tensor
    ) -> None:
        """Add tokens of a pass.

        Args:
            positions: ``[n]``.
            covered: ``[n]`` bool.
            x: ``[n, d_out]`` the stream where the SAE writes.
            x_hat: ``[n, d_out]`` its reconstruction.
            l0: ``[n]`` how many features fire.
        """
        columns = (column[covered].cpu().numpy() for column in (positions, x, x_hat, l0))
        self._observed.put(*columns)

    def summary(self, limit: int) -> dict[str, Any]:
        """The fields of `sae.self_check.Measured` over the positions below ``limit``."""
        return asdict(self._observed.measured(limit))
