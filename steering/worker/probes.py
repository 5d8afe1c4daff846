"""What a pass may observe of an SAE besides the edits, one small class for each kind.

A probe belongs to one request's record. It is given the tokens of each pass that the request reads,
and says at the end what it saw at the positions that count.
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

    On a CPU it costs nothing to ask whether there are ties. Most tokens have none there, and are
    ranked by `topk` alone.

    Args:
        f: ``[n, d_sae]`` float32 activations.
        k: how many.

    Returns:
        Latents int32 and values float32, ``[n, min(k, d_sae)]`` each; if fewer are positive, the
        rest of both are zeros.
    """
    if f.device.type != "cpu":
        return strongest_in_one(f, k)
    values, latents = f.topk(min(k + 1, f.shape[1]), dim=1)  # one more, with which the last may tie
    is_nan = values[:, 0].isnan()  # `topk` takes NaN for the largest, but it is no activation
    ties = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > 0)
    values, latents = values[:, :k], torch.where(values > 0, latents, 0)[:, :k].int()
    values = torch.where(values > 0, values, 0.0)
    odd = (ties.any(dim=1) | is_nan).nonzero()[:, 0]
    if len(odd):
        latents[odd], values[odd] = strongest_in_one(f[odd], k)
    return latents, values


def strongest_in_one(f: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`strongest`, but value and index are ranked as one number: nothing waits for the device."""
    d_sae = f.shape[1]
    # The bits of floats that are not negative are ordered as the floats are.
    bits = torch.where(f > 0, f, 0.0).view(torch.int32).long()
    last = torch.arange(d_sae - 1, -1, -1, device=f.device)
    best = ((bits << 32) | last).topk(min(k, d_sae), dim=1).values
    values = (best >> 32).int().view(torch.float32)
    latents = (d_sae - 1 - (best & 0xFFFFFFFF)).int()
    return torch.where(values > 0, latents, 0), values


class TopFeatures:
    """The strongest features of each token of one request.

    Args:
        top_k: how many of each token.
        stream: whether they are handed out as they are read; see `unsent`.
    """

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
            covered: ``[n]`` bool, whether the token is read. A token that is not takes back what
                was read at its position before, from one that was rejected.
            latents: ``[n, >= top_k]`` best first.
            values: ``[n, >= top_k]`` their activations.
        """
        row = covered, latents[:, : self._top_k], values[:, : self._top_k]
        self._rows.put(positions, *row)
        if self._unsent is not None:
            self._unsent.append((positions, *row))

    def unsent(self) -> tuple[IntArray, BoolArray, IntArray, FloatArray] | None:
        """What was put since the last call, in that order; None if nothing was.

        Returns:
            Positions ``[n]``, covered ``[n]``, latents ``[n, top_k]`` and values ``[n, top_k]``.
        """
        if not self._unsent:
            return None
        parts, self._unsent = self._unsent, []
        positions, covered, latents, values = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        return positions, covered, latents, values

    def summary(self, limit: int) -> list[bytes] | None:
        """What was read at positions below ``limit``; None if no token was ever put.

        Returns:
            Bytes of positions int64, latents int32 and values float32, which `features_read`
            unpacks: to make lists of a million numbers here would hold up the worker, and with it
            everybody's tokens.
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
    """Maximum, sum and count of every latent over a text.

    They stay on the device until they are asked for. A position counts when it is first observed,
    and an activation that is not finite counts as 0.

    Args:
        aggregate: ``max``, ``mean`` or ``frequency``: what latents are scored by.
        top_k: how many latents to tell.
        d_sae: latents of the SAE.
        device: where the activations are.

    Attributes:
        maximum: ``[d_sae]`` float32, the largest activation.
        total: ``[d_sae]`` float64, the sum of activations.
        count: ``[d_sae]`` int64, on how many tokens the latent was active.
        num_tokens: ``[]`` int64, how many tokens were observed.
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
        """Add tokens of a pass.

        Args:
            positions: ``[n]`` int64.
            covered: ``[n]`` bool, whether the token is read.
            f: ``[n, d_sae]`` float32 activations.
        """
        fresh = covered & (positions >= self._counted_to)
        # JSON has no infinity, and a single one would make the sum of the whole text infinite.
        f = torch.where(fresh[:, None] & f.isfinite(), f, 0.0)
        torch.maximum(self.maximum, f.amax(dim=0), out=self.maximum)
        self.total += f.sum(dim=0, dtype=torch.float64)
        self.count += (f > 0).sum(dim=0)
        self.num_tokens += fresh.sum()
        self._counted_to = torch.maximum(
            self._counted_to, torch.where(covered, positions + 1, 0).amax()
        )

    def summary(self, limit: int) -> list[list[float]]:
        """``[latent, score]`` of the latents with the highest positive scores.

        Best first, ties by lower index.

        Args:
            limit: ignored, since only prompts are aggregated, and all of a prompt counts.
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
    """How well an SAE reconstructs the stream: what a self-check measures."""

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
            covered: ``[n]`` bool, whether the token is read.
            x: ``[n, d_out]`` the stream where the SAE writes.
            x_hat: ``[n, d_out]`` the SAE's reconstruction of it.
            l0: ``[n]`` how many features fire.
        """
        columns = (column[covered].cpu().numpy() for column in (positions, x, x_hat, l0))
        self._observed.put(*columns)

    def summary(self, limit: int) -> dict[str, Any]:
        """The fields of `sae.self_check.Measured` over the positions below ``limit``."""
        return asdict(self._observed.measured(limit))
