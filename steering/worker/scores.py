"""What final hidden states say of a text: the distributions that they predict, and two compared.

All figures are of softmax(logits) over the whole vocabulary as the model defines it, in float32 and
natural logarithms. NaN counts as 0, and infinity as `LARGEST`, so that an edit too large for the
stream's dtype gives large figures, and a token that the model itself rules out counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

#: Stands for infinity among logits: sums of differences of it stay within float32.
LARGEST: Final = 1e30
#: Logits of one call of the head: 64 MiB of float32, of which about six exist at a time.
MAX_BLOCK: Final = 2**24
#: Beside a CPU, those of them that are reduced together, within its caches.
MAX_CACHED_BLOCK: Final = 2**19
#: Texts of this many times fewer rows than a block has go through the head together.
MANY: Final = 16

#: ``[n, d]`` final hidden states to ``[n, vocabulary]`` logits; None on a rank that has none.
Logits = Callable[[Tensor], Tensor | None]
#: Figures by name, one row a position each: what `compare` and `log_probabilities` say.
Columns = dict[str, Tensor]


@dataclass(frozen=True)
class SteeredSide:
    """One text that is compared with an unsteered one.

    Attributes:
        hidden: ``[n, d]`` its final hidden states.
        watched: ids whose probabilities are told, ``w`` of them.
    """

    hidden: Tensor
    watched: Sequence[int] = ()


class Scores:
    """Figures of texts, by one model's head.

    Args:
        logits: the head. It is called equally often on all ranks that hold the same rows.
        vocab_size: roughly its width, by which rows are parted into blocks.
        device: of the model.
        reports: False on a rank whose figures nobody asks for.
    """

    def __init__(
        self, logits: Logits, vocab_size: int, device: torch.device, *, reports: bool = True
    ) -> None:
        self._logits = logits
        self._device = device
        self._reports = reports
        self._block = max(1, MAX_BLOCK // vocab_size)
        cached = MAX_CACHED_BLOCK if device.type == "cpu" else MAX_BLOCK
        self._reduced = max(1, cached // vocab_size)

    def compare(
        self, unsteered: Tensor, steered: Sequence[SteeredSide], targets: Sequence[int]
    ) -> list[Columns] | None:
        """Compare each steered text with the unsteered one, position by position.

        Rows of both go through the head in calls of one shape, so that equal rows have equal
        logits.

        Args:
            unsteered: ``[n, d]`` final hidden states.
            steered: the others, ``n`` rows each.
            targets: ``[n]`` the actual tokens, or none.

        Returns:
            For each steered text ``kl`` = KL(unsteered || steered), ``reverse_kl``, ``unsteered``
            and ``steered`` (log p of the targets; nan without any), ``confidence_unsteered`` and
            ``confidence_steered`` (the largest log p), float32 ``[n]``; ``top_unsteered`` and
            ``top_steered`` int64 ``[n]``; ``watched_unsteered`` and ``watched_steered`` (log p)
            float32 and ``ranks_steered`` (how many tokens are strictly likelier) int64 ``[n, w]``.
            None on a rank that has no logits, or does not report.
        """
        parts: list[list[Columns]] = [[] for _ in steered]
        for start in range(0, len(unsteered), self._block):
            rows = slice(start, start + self._block)
            before, actual = unsteered[rows], self._targets(targets[rows], len(unsteered[rows]))
            together = max(1, self._block // len(before) - 1)
            stacked = together >= MANY
            known = None if stacked else self._distribution(self._head([before]))
            for first in range(0, len(steered), together if stacked else 1):
                sides = steered[first : first + (together if stacked else 1)]
                after = [side.hidden[rows] for side in sides]
                logits = self._head([before, *after] if stacked else after)
                if logits is None:
                    continue
                if stacked:
                    known, logits = self._distribution(logits[: len(before)]), logits[len(before) :]
                assert known is not None
                for i, of_side in enumerate(torch.split(logits, len(before))):
                    parts[first + i].append(
                        self._compared(known, of_side, actual, sides[i].watched)
                    )
        return [_joined(of_side) for of_side in parts] if all(parts) else None

    def log_probabilities(self, hidden: Tensor, targets: Sequence[int]) -> Tensor | None:
        """Log p of the actual tokens of one text.

        Args:
            hidden: ``[n, d]`` final hidden states.
            targets: ``[n]`` the actual tokens.

        Returns:
            ``[n]`` float32; None on a rank that has no logits, or does not report.
        """
        found = []
        for start in range(0, len(hidden), self._block):
            rows = slice(start, start + self._block)
            logits = self._head([hidden[rows]])
            if logits is not None:
                actual = self._targets(targets[rows], len(logits))
                found += [
                    _at(_log_softmax(logits[part]), actual[part])
                    for part in self._parts(len(logits))
                ]
        return torch.cat(found).cpu() if found else None

    def _head(self, hidden: Sequence[Tensor]) -> Tensor | None:
        """``[n, vocabulary]`` logits of rows from the host; None where they are not needed."""
        rows = [one.to(self._device, non_blocking=True) for one in hidden]
        logits = self._logits(rows[0] if len(rows) == 1 else torch.cat(rows))
        return logits if self._reports else None

    def _targets(self, ids: Sequence[int], n: int) -> Tensor:
        """``[n]`` on the device; -1 where there is none."""
        return torch.tensor(list(ids) or [-1] * n, dtype=torch.int64, device=self._device)

    def _parts(self, n: int) -> Iterator[slice]:
        return (slice(i, i + self._reduced) for i in range(0, n, self._reduced))

    def _distribution(self, logits: Tensor | None) -> _Distribution | None:
        if logits is None:
            return None
        log_p = torch.empty(logits.shape, dtype=torch.float32, device=self._device)
        p = torch.empty_like(log_p)
        for part in self._parts(len(logits)):
            log_p[part] = _log_softmax(logits[part])
            torch.exp(log_p[part], out=p[part])
        return _Distribution(log_p, p, p.sum(-1), *log_p.max(-1))

    def _compared(
        self, before: _Distribution, logits: Tensor, targets: Tensor, watched: Sequence[int]
    ) -> Columns:
        ids = torch.tensor(list(watched), dtype=torch.int64, device=self._device)
        found = []
        for part in self._parts(len(logits)):
            log_p, p = before.log_p[part], before.p[part]
            log_q = _log_softmax(logits[part])
            q = log_q.exp()
            ratio = log_p - log_q
            # KL as a Bregman divergence: what rounding left of the two sums' being 1 is taken out.
            surplus = q.sum(-1) - before.total[part]
            confidence, top = log_q.max(-1)
            after = log_q[:, ids]
            found.append(
                {
                    "kl": ((p * ratio).sum(-1) + surplus).clamp_min(0),
                    "reverse_kl": (-(q * ratio).sum(-1) - surplus).clamp_min(0),
                    "unsteered": _at(log_p, targets[part]),
                    "steered": _at(log_q, targets[part]),
                    "top_unsteered": before.top[part],
                    "top_steered": top,
                    "confidence_unsteered": before.confidence[part],
                    "confidence_steered": confidence,
                    "watched_unsteered": log_p[:, ids],
                    "watched_steered": after,
                    "ranks_steered": _ranks(log_q, after),
                }
            )
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}


@dataclass(frozen=True)
class _Distribution:
    """Of some rows: ``[n, vocabulary]`` log p and p, and ``[n]`` sum, largest and likeliest."""

    log_p: Tensor
    p: Tensor
    total: Tensor
    confidence: Tensor
    top: Tensor


def _log_softmax(logits: Tensor) -> Tensor:
    """Of logits that nobody needs any more."""
    z = torch.nan_to_num_(logits.float(), nan=0.0, posinf=LARGEST, neginf=-LARGEST)
    return torch.log_softmax(z, dim=-1)


def _at(log_p: Tensor, ids: Tensor) -> Tensor:
    """``[n]`` log p of one id a row, nan where that is negative."""
    found = log_p.gather(-1, ids.clamp_min(0)[:, None])[:, 0]
    return found.masked_fill(ids < 0, torch.nan)


def _ranks(log_p: Tensor, of: Tensor) -> Tensor:
    """``[n, w]`` how many tokens are strictly likelier than those of these log p."""
    ranks = [(log_p > column[:, None]).sum(-1) for column in of.T]
    return torch.stack(ranks, -1) if ranks else torch.zeros_like(of, dtype=torch.int64)


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
