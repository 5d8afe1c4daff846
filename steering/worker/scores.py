"""What final hidden states say of a text: the distributions that they predict, and how two differ.

All figures are of softmax(logits) over the whole vocabulary as the model defines it, in float32 and
natural logarithms. Among logits NaN counts as 0, and infinity as `LARGEST`: an edit too large for
the stream's dtype then gives large figures, and a token that the model itself rules out adds
nothing.
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
#: On a CPU, how many of them are reduced together, so that they fit its caches.
MAX_CACHED_BLOCK: Final = 2**19
#: Texts go through the head together if at least this many of them fit into a block.
MANY: Final = 16

#: Takes ``[n, d]`` final hidden states to ``[n, vocabulary]`` logits; None on a rank without
#: logits.
Logits = Callable[[Tensor], Tensor | None]
#: Figures by name, with a row for each position; see `Scores.compare`.
Columns = dict[str, Tensor]


@dataclass(frozen=True)
class SteeredSide:
    """One text that is compared with an unsteered one.

    Attributes:
        hidden: ``[n, d]`` the text's final hidden states.
        watched: ``w`` token ids whose probabilities are to be returned.
    """

    hidden: Tensor
    watched: Sequence[int] = ()


class Scores:
    """Figures of texts, by one model's output head.

    Args:
        logits: the head. It is called equally often on all ranks that hold the same rows.
        vocab_size: roughly the number of logits of a row, by which rows are cut into blocks.
        device: where the model runs.
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
            steered: the texts to compare with it, ``n`` rows each.
            targets: ``[n]`` ids of the actual tokens, or an empty list.

        Returns:
            For each steered text float32 ``[n]``: ``kl`` = KL(unsteered || steered), ``reverse_kl``
            = KL(steered || unsteered), ``unsteered`` and ``steered`` (log p of the targets; NaN
            without targets), ``confidence_unsteered`` and ``confidence_steered`` (the largest
            log p); int64 ``[n]``: ``top_unsteered`` and ``top_steered`` (the likeliest token);
            float32 ``[n, w]``: ``watched_unsteered`` and ``watched_steered`` (log p); int64
            ``[n, w]``: ``ranks_steered`` (how many tokens are strictly likelier). None on a rank
            that has no logits or does not report, and if there are no steered texts or no rows.
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
            targets: ``[n]`` ids of the actual tokens.

        Returns:
            ``[n]`` float32; None on a rank that has no logits or does not report.
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
        """``[n, vocabulary]`` logits of rows from the host; None if this rank does not report."""
        rows = [part.to(self._device, non_blocking=True) for part in hidden]
        logits = self._logits(rows[0] if len(rows) == 1 else torch.cat(rows))
        return logits if self._reports else None

    def _targets(self, ids: Sequence[int], n: int) -> Tensor:
        """``[n]`` int64 on the device; -1 for each if there are no targets."""
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
            # KL as a Bregman divergence: rounding keeps the two sums of probabilities from being
            # exactly 1, and their difference is taken out.
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
    """The distributions that some rows predict.

    Attributes:
        log_p: ``[n, vocabulary]`` float32.
        p: ``[n, vocabulary]`` float32.
        total: ``[n]`` float32, the sum of ``p``.
        confidence: ``[n]`` float32, the largest ``log_p``.
        top: ``[n]`` int64, the likeliest token.
    """

    log_p: Tensor
    p: Tensor
    total: Tensor
    confidence: Tensor
    top: Tensor


def _log_softmax(logits: Tensor) -> Tensor:
    """Log p ``[n, vocabulary]`` float32; the logits may be overwritten."""
    z = torch.nan_to_num_(logits.float(), nan=0.0, posinf=LARGEST, neginf=-LARGEST)
    return torch.log_softmax(z, dim=-1)


def _at(log_p: Tensor, ids: Tensor) -> Tensor:
    """``[n]`` log p of one id for each row; NaN if the id is negative."""
    found = log_p.gather(-1, ids.clamp_min(0)[:, None])[:, 0]
    return found.masked_fill(ids < 0, torch.nan)


def _ranks(log_p: Tensor, of: Tensor) -> Tensor:
    """``[n, w]`` int64, how many tokens have a larger log p than each of these ``[n, w]``."""
    ranks = [(log_p > column[:, None]).sum(-1) for column in of.T]
    return torch.stack(ranks, -1) if ranks else torch.zeros_like(of, dtype=torch.int64)


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
