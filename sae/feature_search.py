"""The order of a list of features: by how well labels match a query, or by a recorded figure.

Full-text search over feature labels is an inverted index in memory, ranked by BM25.

A query is a list of words; it has no syntax. Each word may be the beginning of a label's word;
whole words count more. What matches are the labels with all of the words. If there are none, it is
those with any of them, the ones with most words first; if there are none either, the labels that
contain the query as a string.

    score(label) = sum over words w of idf(w) * sum over tokens t of the label that begin with w
                   of tf(t) (k + 1) / (tf(t) + k (1 - b + b |label| / mean |label|))

(Robertson and Zaragoza 2009, eq. 3.15), with a token that equals its word counted WHOLE_WORD times.

SQLite's FTS5 is not used because it is slow: over 65k labels, a word that a third of them have
takes it 100 ms and the beginning of many words 600 ms. This index takes 1 to 3 ms.
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

MAX_QUERY_CHARS = 1000
MAX_WORDS = 16

K = 1.2
B = 0.75
WHOLE_WORD = 3.0

_TOKEN = re.compile(r"\w+")
_AFTER_ANY_CHARACTER = "\U0010ffff"

#: The recorded figures by which a list of features may be ordered.
ORDERS: Final = ("output_score", "density", "max_activation")

Scores = npt.NDArray[np.float64]  # [labels]


class Figures(Protocol):
    """The recorded figures of a feature; None for one that is not recorded."""

    @property
    def index(self) -> int: ...
    @property
    def output_score(self) -> float | None: ...
    @property
    def density(self) -> float | None: ...
    @property
    def max_activation(self) -> float | None: ...


F = TypeVar("F", bound=Figures)


def ordered(features: Iterable[F], order: str) -> list[F]:
    """Features by one of `ORDERS`: highest first, those without it last, ties by index."""
    assert order in ORDERS, order

    def place(feature: F) -> tuple[bool, float, int]:
        value: float | None = getattr(feature, order)
        return value is None, -(value or 0.0), feature.index

    return sorted(features, key=place)


@dataclass(frozen=True)
class _Postings:
    """Where each token occurs: postings of all tokens, in the order of the sorted vocabulary."""

    vocabulary: list[str]
    starts: list[int]  # [tokens + 1]: the first posting of each token
    labels: npt.NDArray[np.int64]  # [postings]: which label
    weights: Scores  # [postings]: BM25's weight of the token in it

    def beginning_with(self, prefix: str) -> slice:
        first = bisect_left(self.vocabulary, prefix)
        last = bisect_left(self.vocabulary, prefix + _AFTER_ANY_CHARACTER)
        return slice(self.starts[first], self.starts[last])

    def of(self, token: str) -> slice:
        place = bisect_left(self.vocabulary, token)
        found = place < len(self.vocabulary) and self.vocabulary[place] == token
        return slice(self.starts[place], self.starts[place + found])


class LabelIndex:
    """An index of (feature, label) pairs, built on construction; searches change nothing in it."""

    def __init__(self, labels: Iterable[tuple[int, str]]) -> None:
        pairs = sorted(labels)
        self._features = np.array([feature for feature, _ in pairs], dtype=np.int64)
        self._folded = [fold(label) for _, label in pairs]
        self._postings = _index(self._folded)

    def search(self, query: str, limit: int, offset: int) -> tuple[list[int], int]:
        """Features whose labels match, best first, ties by index; and how many match in all."""
        folded = fold(query[:MAX_QUERY_CHARS]).strip()
        words = list(dict.fromkeys(_TOKEN.findall(folded)))[:MAX_WORDS]
        scores = np.zeros(len(self._folded))
        num_words = np.zeros(len(self._folded), dtype=np.int64)
        for word in words:
            score = self._score(word)
            scores += score
            num_words += score > 0
        most = int(num_words.max(initial=0))
        if most == 0:
            matching = self._containing(folded)
        elif most == len(words):
            matching = np.flatnonzero(num_words == most)
        else:
            matching = np.flatnonzero(num_words)
        order = np.lexsort((-scores[matching], -num_words[matching]))
        shown = matching[order[offset : offset + limit]]
        return [int(feature) for feature in self._features[shown]], len(matching)

    def _score(self, word: str) -> Scores:
        """BM25 of one word in every label; above 0 exactly where the label has it."""
        postings, size = self._postings, len(self._folded)
        part = postings.beginning_with(word)
        # Without postings, bincount returns integers.
        score = np.bincount(postings.labels[part], postings.weights[part], minlength=size) * 1.0
        frequency = np.count_nonzero(score)
        whole = postings.of(word)
        score[postings.labels[whole]] += (WHOLE_WORD - 1) * postings.weights[whole]
        idf = math.log(1 + (size - frequency + 0.5) / (frequency + 0.5))
        return np.asarray(score * idf, dtype=np.float64)

    def _containing(self, text: str) -> npt.NDArray[np.int64]:
        found = [place for place, label in enumerate(self._folded) if text and text in label]
        return np.array(found, dtype=np.int64)


def fold(text: str) -> str:
    """The text without case and accents, so that a query finds a label however they are written."""
    if text.isascii():
        return text.lower()
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(c for c in decomposed if not unicodedata.combining(c)).casefold()


def _index(labels: list[str]) -> _Postings:
    places: dict[str, list[int]] = {}
    lengths = np.zeros(len(labels))
    for place, label in enumerate(labels):
        tokens = _TOKEN.findall(label)
        lengths[place] = len(tokens)
        for token in tokens:
            places.setdefault(token, []).append(place)
    vocabulary = sorted(places)
    # A place occurs as often in a row as the token occurs in the label.
    repeated = np.fromiter(chain.from_iterable(places[token] for token in vocabulary), np.int64)
    ends = np.cumsum([len(places[token]) for token in vocabulary], dtype=np.int64)
    first = np.ones(len(repeated), dtype=bool)
    first[1:] = repeated[1:] != repeated[:-1]
    first[ends[:-1]] = True
    rank = np.cumsum(first)
    tf = np.bincount(rank - 1) if len(rank) else np.zeros(0)
    distinct = repeated[first]
    length = lengths[distinct] / max(float(lengths.mean()), 1.0) if len(labels) else lengths
    return _Postings(
        vocabulary=vocabulary,
        starts=[0, *(int(rank[end - 1]) for end in ends)],
        labels=distinct,
        weights=tf * (K + 1) / (tf + K * (1 - B + B * length)),
    )
