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
#: Logits of one call of the head: 64 MiB of float32, of which about four exist at a time.
MAX_BLOCK: Final = 2**24
#: Rows of one call of the head on a CPU. More make it no faster, and logits of 32 MiB and more (at
#: 128 rows, of 65,536 tokens) are taken from the system each time by malloc, page by page.
MAX_CPU_ROWS: Final = 128
#: On a CPU, how many of a text's logits are reduced together, so that they fit its caches.
MAX_CACHED_BLOCK: Final = 2**19
#: Up to so many steered texts share a call of the head, however few rows of each it then takes. A
#: call has the unsteered rows as well, which add little beside so many.
MANY: Final = 16
#: How many neighbouring logits are looked through together for the largest one.
CHUNK: Final = 128

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
        self._block = self._reduced = max(1, MAX_BLOCK // vocab_size)
        if device.type == "cpu":
            self._block = min(self._block, MAX_CPU_ROWS)
            self._reduced = max(1, MAX_CACHED_BLOCK // vocab_size)

    def compare(
        self, unsteered: Tensor, steered: Sequence[SteeredSide], targets: Sequence[int]
    ) -> list[Columns] | None:
        """Compare each steered text with the unsteered one, position by position.

        Rows of both go through the head in one call, so that equal rows have equal logits.

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
        watched = [self._ids(side.watched) for side in steered]
        for rows in _cut(len(unsteered), self._block // (min(len(steered), MANY) + 1)):
            before = unsteered[rows]
            n = len(before)
            actual = self._targets(targets[rows], n)
            together = max(1, self._block // n - 1)
            for first in range(0, len(steered), together):
                sides = steered[first : first + together]
                logits = self._head([before, *(side.hidden[rows] for side in sides)])
                if logits is None:
                    continue
                known, *others = torch.split(logits, n)
                for part in _cut(n, self._reduced):
                    distribution = _distribution(known[part])
                    for i, other in enumerate(others, first):
                        after = _distribution(other[part])
                        parts[i].append(_compared(distribution, after, actual[part], watched[i]))
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
        for rows in _cut(len(hidden), self._block):
            logits = self._head([hidden[rows]])
            if logits is None:
                continue
            actual = self._targets(targets[rows], len(logits))
            for part in _cut(len(logits), self._reduced):
                found.append(_distribution(logits[part]).log_p(actual[part, None])[:, 0])
        return torch.cat(found).cpu() if found else None

    def _head(self, hidden: Sequence[Tensor]) -> Tensor | None:
        """``[n, vocabulary]`` logits of rows from the host; None if this rank does not report."""
        rows = [part.to(self._device, non_blocking=True) for part in hidden]
        logits = self._logits(rows[0] if len(rows) == 1 else torch.cat(rows))
        return logits if self._reports else None

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self._device)

    def _targets(self, ids: Sequence[int], n: int) -> Tensor:
        """``[n]`` int64 on the device; -1 for each if there are no targets."""
        return self._ids(list(ids) or [-1] * n)


@dataclass(frozen=True)
class _Distribution:
    """The distributions that some rows predict.

    Attributes:
        z: ``[n, vocabulary]`` float32, the logits less the largest of their row.
        p: ``[n, vocabulary]`` float32, the probabilities.
        total: ``[n]`` float64, the sum of ``p``, which rounding keeps from being exactly 1.
        log_sum: ``[n]`` float64, the logarithm of the sum of exp(z): log p = z - log_sum.
        top: ``[n]`` int64, the likeliest token.
    """

    z: Tensor
    p: Tensor
    total: Tensor
    log_sum: Tensor
    top: Tensor

    @property
    def confidence(self) -> Tensor:
        """``[n]`` float32, the largest log p."""
        return -self.log_sum.float()

    def log_p(self, ids: Tensor) -> Tensor:
        """``[n, w]`` float32, log p of ``[n, w]`` ids; NaN if an id is negative."""
        found = self.z.gather(-1, ids.clamp_min(0)) - self.log_sum[:, None]
        return found.float().masked_fill(ids < 0, torch.nan)


def _distribution(logits: Tensor) -> _Distribution:
    """What rows ``[n, vocabulary]`` of logits predict; the logits may be overwritten.

    On a CPU an exponential takes as long as ten sums, hence one for each logit. At the largest,
    exp(z) is 1, so its p is one over what softmax divided by. That is a float32 sum in which many
    small terms were lost beside the large ones, hence the sum of all p, which torch takes pairwise.
    """
    z = torch.nan_to_num_(logits.float(), nan=0.0, posinf=LARGEST, neginf=-LARGEST)
    top = _argmax(z)
    z -= z.gather(-1, top)
    p = torch.softmax(z, dim=-1)
    total = p.sum(-1).double()
    log_sum = total.log() - p.gather(-1, top)[:, 0].double().log()
    return _Distribution(z, p, total, log_sum, top[:, 0])


def _compared(before: _Distribution, after: _Distribution, targets: Tensor, ids: Tensor) -> Columns:
    """Figures of some rows; see `Scores.compare`.

    KL is the mean of z_p - z_q under p, plus the difference of the logarithms of both sums of
    exponentials. As in a Bregman divergence, these are of the very p and q that are at hand: equal
    rows have exactly 0, and nearly equal ones keep their digits.

    Args:
        before: of the unsteered rows.
        after: of the steered ones.
        targets: ``[n]`` ids, or -1.
        ids: ``[w]`` the watched ones.
    """
    difference = before.z - after.z
    shift = after.log_sum - before.log_sum
    kl = torch.linalg.vecdot(before.p, difference) / before.total + shift
    reverse_kl = -torch.linalg.vecdot(after.p, difference) / after.total - shift
    watched = ids.expand(len(targets), -1)
    return {
        "kl": kl.float().clamp_min(0),
        "reverse_kl": reverse_kl.float().clamp_min(0),
        "unsteered": before.log_p(targets[:, None])[:, 0],
        "steered": after.log_p(targets[:, None])[:, 0],
        "top_unsteered": before.top,
        "top_steered": after.top,
        "confidence_unsteered": before.confidence,
        "confidence_steered": after.confidence,
        "watched_unsteered": before.log_p(watched),
        "watched_steered": after.log_p(watched),
        "ranks_steered": _ranks(after.z, after.z[:, ids]),
    }


def _argmax(z: Tensor) -> Tensor:
    """``[n, 1]`` int64, the first of the largest of each row ``[n, v]``, in which no NaN is.

    On a CPU torch's argmax takes ten times as long as its amax, so it is asked only which chunk
    has the largest, and where in that it is.
    """
    v = z.shape[1]
    chunks = v // CHUNK
    largest = z[:, : chunks * CHUNK].view(len(z), chunks, CHUNK).amax(-1)
    if v % CHUNK:
        largest = torch.cat([largest, z[:, chunks * CHUNK :].amax(-1, keepdim=True)], dim=-1)
    first = largest.argmax(-1, keepdim=True) * CHUNK
    ids = (first + torch.arange(CHUNK, device=z.device)).clamp_max(v - 1)
    return ids.gather(-1, z.gather(-1, ids).argmax(-1, keepdim=True))


def _ranks(z: Tensor, of: Tensor) -> Tensor:
    """``[n, w]`` int64, how many of ``[n, vocabulary]`` are larger than each of ``[n, w]``."""
    ranks = [(z > column[:, None]).sum(-1) for column in of.T]
    return torch.stack(ranks, -1) if ranks else torch.zeros_like(of, dtype=torch.int64)


def _cut(n: int, most: int) -> Iterator[slice]:
    """Parts of ``n`` rows, of nearly one size: at most ``most`` rows, and at least one."""
    parts = -(-n // max(1, most))
    return (slice(i * n // parts, (i + 1) * n // parts) for i in range(parts))


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
