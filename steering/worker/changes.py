"""How an SAE's features changed between two runs of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from sae.card import KINDS_THAT_DECODE
from sae.sae import SAE
from steering.worker.kept_streams import KeptStream, counterparts

#: Elements of one array of activations; a block has about six such arrays at a time.
_BLOCK_ELEMENTS: Final = 2**22


@torch.inference_mode()
def compare(
    unsteered: KeptStream,
    steered: KeptStream,
    sae: SAE,
    start: int,
    stop: int,
    device: torch.device,
) -> dict[str, Any]:
    """Encode both streams and compare the activations, in blocks of tokens.

    A token that is a sink in the unsteered run takes no part.

    Args:
        unsteered: the stream of the unsteered run.
        steered: the stream of the steered run.
        sae: the SAE, with its matrices on the device.
        start: the first of the steered run's kept tokens to compare.
        stop: one past the last.
        device: where to compute.

    Returns:
        Sums over the tokens: ``unmatched``, how many of them the unsteered run does not have;
        ``tokens``, how many were compared; ``latents`` ``[m]`` int32, the latents that fire in
        either run; ``before`` and ``after`` ``[m]`` float64, the sums of their activations (these
        three as bytes). Over the latents that the run does not edit: ``newly_active`` and
        ``silenced``, how often one fires only in the steered or only in the unsteered run, and
        ``others``, the squared norm of their change. ``asked``, the squared norm of the change that
        the edits ask for. ``stream``, the squared norm of the stream's change, and
        ``unexplained``, that of the part which the change of the features, decoded, does not
        explain; both None for an SAE that does not write where it reads.
    """
    where = counterparts(unsteered, steered)
    tokens = np.arange(min(start, len(where)), min(stop, len(where)))
    matched = tokens[where[tokens] >= 0]
    found = _Sums(sae, steered.edited, device)
    size = max(1, _BLOCK_ELEMENTS // sae.card.d_sae)
    for first in range(0, len(matched), size):
        block = matched[first : first + size]
        found.add(
            torch.from_numpy(unsteered.x[where[block]]).to(device),
            torch.from_numpy(steered.x[block]).to(device),
            torch.from_numpy(steered.asked[block]).to(device),
        )
    return {"unmatched": len(tokens) - len(matched), **found.summary()}


class _Sums:
    """Sums over blocks of tokens, on the device: float64, and int64 for counts."""

    def __init__(self, sae: SAE, edited: Sequence[int], device: torch.device) -> None:
        self._sae = sae
        self._edited = torch.tensor(sorted(set(edited)), dtype=torch.int64, device=device)
        self._tokens = 0
        d_sae = sae.card.d_sae
        self._before, self._after = torch.zeros(2, d_sae, dtype=torch.float64, device=device)
        self._newly_active, self._silenced = torch.zeros(2, dtype=torch.int64, device=device)
        self._others, self._asked, self._stream, self._unexplained = torch.zeros(
            4, dtype=torch.float64, device=device
        )

    def add(self, x: Tensor, x_new: Tensor, asked: Tensor) -> None:
        """Add tokens.

        Args:
            x: ``[n, d_in]`` float32, the stream of the unsteered run.
            x_new: ``[n, d_in]`` float32, the stream of the steered run.
            asked: ``[n]`` float32, see `KeptStream`.
        """
        sink_norm = self._sae.card.sink_norm
        if sink_norm is not None:
            kept = ~(torch.linalg.vector_norm(x, dim=1) > sink_norm)
            x, x_new, asked = x[kept], x_new[kept], asked[kept]
        self._tokens += len(x)
        f, f_new = (_finite(self._sae.encode(stream)) for stream in (x, x_new))
        self._before += f.sum(dim=0, dtype=torch.float64)
        self._after += f_new.sum(dim=0, dtype=torch.float64)
        self._asked += asked.sum(dtype=torch.float64)
        change = f_new - f
        if self._sae.card.one_place:
            of_stream = x_new - x
            self._stream += _square(of_stream)
            self._unexplained += _square(of_stream - self._decoded(change, f, f_new, x, x_new))
        fires, fires_new = f > 0, f_new > 0
        for of_edited, nothing in ((change, 0.0), (fires, False), (fires_new, False)):
            of_edited[:, self._edited] = nothing
        self._others += _square(change)
        self._newly_active += (fires_new & ~fires).sum()
        self._silenced += (fires & ~fires_new).sum()

    def _decoded(
        self, change: Tensor, f: Tensor, f_new: Tensor, x: Tensor, x_new: Tensor
    ) -> Tensor:
        """The change of the reconstruction ``[n, d_in]``.

        Without a normalized input it is linear in the features, so their change is decoded.
        """
        sae = self._sae
        if sae.card.normalize_activations == "none":
            return sae.written(change)
        if sae.card.kind in KINDS_THAT_DECODE:
            return sae.decode(f_new, x_new) - sae.decode(f, x)
        (_, g), (_, g_new) = sae.normalize(x), sae.normalize(x_new)
        return sae.written(f_new * g_new[:, None] - f * g[:, None])

    def summary(self) -> dict[str, Any]:
        """The figures that `compare` returns."""
        fired = ((self._before != 0) | (self._after != 0)).nonzero().squeeze(1)
        latents, before, after = (
            column.cpu().numpy().tobytes()
            for column in (fired.int(), self._before[fired], self._after[fired])
        )
        one_place = self._sae.card.one_place
        return {
            "tokens": self._tokens,
            "latents": latents,
            "before": before,
            "after": after,
            "newly_active": int(self._newly_active),
            "silenced": int(self._silenced),
            "others": float(self._others),
            "asked": float(self._asked),
            "stream": float(self._stream) if one_place else None,
            "unexplained": float(self._unexplained) if one_place else None,
        }


def _finite(f: Tensor) -> Tensor:
    return torch.where(f.isfinite(), f, 0.0)


def _square(values: Tensor) -> Tensor:
    return values.double().square().sum()
