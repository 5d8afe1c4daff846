"""Every latent's activations over one text, summed up on the device as its passes go by."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering.request.probe_plan import PlannedPool
from steering.worker.rows_by_position import RowsByPosition


class Pooled:
    """What a `PlannedPool` asks for.

    A position counts when it is first observed, so that one that is computed again counts once.
    Activations that are not finite take no part.

    Args:
        planned: what is asked for.
        d_sae: latents of the SAE.
        device: where the activations are.
        signed: whether activations may be negative.
    """

    def __init__(
        self,
        planned: PlannedPool,
        d_sae: int,
        device: torch.device | str,
        *,
        signed: bool = False,
    ) -> None:
        self._pool = planned.pool
        self._total = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self._count = torch.zeros(d_sae, dtype=torch.int32, device=device)
        # The sum of activations above zero; None if the total is the same.
        differs = signed or planned.scaled
        self._firing = torch.zeros_like(self._total) if differs else None
        # The largest activation, or the last token's; unused if the mean is asked for.
        start = -torch.inf if planned.pool == "max" else 0.0
        self._pooled = torch.full((d_sae,), start, dtype=torch.float32, device=device)
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._counted_to = torch.zeros((), dtype=torch.int64, device=device)
        self._peaks: list[tuple[Tensor, Tensor, Tensor]] | None = [] if planned.peaks else None

    @property
    def nbytes(self) -> int:
        """Memory held, on the device."""
        held = [self._total, self._count, self._pooled]
        if self._firing is not None:
            held.append(self._firing)
        for peaks in self._peaks or ():
            held.extend(peaks)
        return sum(tensor.nbytes for tensor in held)

    def observe(self, position: Tensor, covered: Tensor, f: Tensor, scale: Tensor | None) -> None:
        """Add tokens of a pass.

        Args:
            position: ``[n]`` int64.
            covered: ``[n]`` bool, whether the token takes part.
            f: ``[n, d_sae]`` float32 activations.
            scale: ``[n]`` float32, by which activations are multiplied in the total; None for 1.
        """
        fresh = covered & (position >= self._counted_to)
        counts = fresh[:, None] & f.isfinite()
        f = torch.where(counts, f, 0.0)
        scaled = f if scale is None else f * scale[:, None]
        self._total += scaled.sum(dim=0, dtype=torch.float64)
        self._count += (f > 0).sum(dim=0, dtype=torch.int32)
        if self._firing is not None:
            self._firing += f.clamp(min=0).sum(dim=0, dtype=torch.float64)
        if self._pool == "max":
            largest = torch.where(counts, f, -torch.inf).amax(dim=0)
            torch.maximum(self._pooled, largest, out=self._pooled)
        elif self._pool == "last":
            last = torch.where(fresh, position, -1).argmax()
            self._pooled = torch.where(fresh.any(), f[last], self._pooled)
        if self._peaks is not None:
            # Cloned, since positions may be a view of the runner's buffer.
            self._peaks.append((position.clone(), fresh, f.amax(dim=1)))
        self._num_tokens += fresh.sum()
        self._counted_to = torch.maximum(
            self._counted_to, torch.where(covered, position + 1, 0).amax()
        )

    def summary(self) -> dict[str, Any]:
        """The sums of the latents that were ever anything but zero, as bytes.

        Returns:
            ``tokens``, how many took part; ``latents`` ``[m]`` int32; ``total`` ``[m]`` float64,
            the sum of activations times the scale; ``count`` ``[m]`` int32, on how many tokens the
            latent fired; ``firing`` ``[m]`` float64, the sum of activations above zero, None if
            that is ``total``; ``pooled`` ``[m]`` float32, the maximum or the last token's
            activation, None for a mean; ``peaks``, positions int64 and the largest activation of
            each float32, None if they were not asked for.
        """
        found = ((self._total != 0) | (self._count != 0)).nonzero().squeeze(1)
        pooled = self._pooled[found]
        # Nothing is known of a latent that was nowhere finite.
        pooled = torch.where(pooled.isfinite(), pooled, 0.0)
        return {
            "tokens": int(self._num_tokens),
            "latents": _bytes(found.int()),
            "total": _bytes(self._total[found]),
            "count": _bytes(self._count[found]),
            "firing": None if self._firing is None else _bytes(self._firing[found]),
            "pooled": None if self._pool == "mean" else _bytes(pooled),
            "peaks": self._peaks_by_position(),
        }

    def _peaks_by_position(self) -> list[bytes] | None:
        if self._peaks is None:
            return None
        rows = RowsByPosition()
        for position, fresh, peak in self._peaks:
            taken = fresh.cpu().numpy()
            rows.put(position.cpu().numpy()[taken], peak.cpu().numpy()[taken])
        positions, columns = rows.latest()
        values = columns[0] if columns else np.empty(0, dtype=np.float32)
        return [positions.astype(np.int64).tobytes(), values.astype(np.float32).tobytes()]


def _bytes(values: Tensor) -> bytes:
    return values.cpu().numpy().tobytes()
