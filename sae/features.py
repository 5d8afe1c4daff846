"""Labels and statistics of an SAE's features, from `features.jsonl` beside the weights.

One JSON object a line. Every key but the index may be missing or null; unknown keys are ignored:

    {"index": 0, "label": "...", "max_activation": 6.1, "density": 0.003, "output_score": 0.2,
     "examples": [{"text": "...", "activation": 6.0}]}
"""

from __future__ import annotations

import mmap
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae import json_lines
from sae.errors import SAEError
from sae.feature_search import LabelIndex, ordered
from sae.files import CHECKPOINTS, FEATURES_NAME, find_weights

# A key of a JSON object: inside a string the quotes would be escaped.
_HAS_LABEL = re.compile(rb'(?<!\\)"label"\s*:\s*"[^"]')
_HAS_MAX_ACTIVATION = re.compile(rb'(?<!\\)"max_activation"\s*:\s*[0-9]')


@dataclass(frozen=True, slots=True)
class Example:
    """A text on which a feature is active, and its largest activation there."""

    text: str
    activation: float | None = None


@dataclass(frozen=True, slots=True)
class Feature:
    """What is known of one feature; unknown parts are None."""

    index: int
    label: str | None = None
    max_activation: float | None = None
    density: float | None = None
    output_score: float | None = None
    examples: tuple[Example, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The feature as lists of the HTTP API show it."""
        return {
            "feature": self.index,
            "label": self.label,
            "max_activation": self.max_activation,
            "density": self.density,
            "output_score": self.output_score,
        }


@dataclass(frozen=True)
class _Table:
    """The file, read: what is known of each feature, and where its line starts."""

    features: dict[int, Feature]
    offsets: dict[int, int]
    labels: LabelIndex


class FeatureTable:
    """The features of one SAE. Opening it searches the file twice; it is parsed on first use.

    Safe to use from several threads. The first use raises SAEError if the file is damaged.

    Args:
        path: the file's path; None if there is none.
        d_sae: how many features there are.
        maxima: gives the maximum activation of every feature if the weights state it; what the
            file says of it is then ignored.
    """

    def __init__(
        self, path: Path | None, d_sae: int, maxima: Callable[[], list[float]] | None = None
    ) -> None:
        self.d_sae = d_sae
        self.path = path
        self._maxima = maxima
        self.has_labels = _contains(path, _HAS_LABEL)
        self.has_max_activations = maxima is not None or _contains(path, _HAS_MAX_ACTIVATION)
        self._lock = threading.Lock()
        self._table: _Table | None = None
        self._rankings: dict[str, list[int]] = {}

    @classmethod
    def open(
        cls, weights: Path | str, d_sae: int, maxima: Callable[[], list[float]] | None = None
    ) -> FeatureTable:
        """The table beside a weight file or in a folder; an empty one if there is none."""
        return cls(_find(Path(weights)), d_sae, maxima)

    def load(self) -> None:
        """Read the file now. Raises SAEError, naming the line, if it is damaged."""
        self._loaded()

    def max_activation(self, index: int) -> float | None:
        """None if it is not recorded. Raises IndexError if the feature is not in [0, d_sae)."""
        return self._row(index).max_activation

    def density(self, index: int) -> float | None:
        """The share of tokens on which a feature fires; as `max_activation` otherwise."""
        return self._row(index).density

    def label(self, index: int) -> str | None:
        """None if there is none. Raises IndexError if the feature is not in [0, d_sae)."""
        return self._row(index).label

    def labelled(self) -> list[int]:
        """The features that have a label, ascending."""
        features = self._loaded().features
        return sorted(index for index, feature in features.items() if feature.label is not None)

    def get(self, index: int) -> Feature:
        """One feature with its examples. Raises IndexError if it is not in [0, d_sae).

        Examples are read from the file on each call: none if it has gone or changed since.
        """
        feature = self._row(index)
        offset = self._loaded().offsets.get(index)
        if offset is None or self.path is None:
            return feature
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                found = _parse(str(self.path), file.readline(), self.d_sae)
        except (OSError, SAEError):
            return feature
        return replace(feature, examples=found.examples) if found.index == index else feature

    def page(self, limit: int, offset: int, order: str | None = None) -> tuple[list[Feature], int]:
        """Features without their examples, and how many there are in all.

        Args:
            limit: how many at most.
            offset: how many to pass over.
            order: one of `sae.feature_search.ORDERS`, highest first; None for the order of indices.
        """
        stop = min(offset + limit, self.d_sae)
        if order is None:
            return [self._row(index) for index in range(offset, stop)], self.d_sae
        ranking = self._ranking(order)
        return [self._row(ranking[place]) for place in range(offset, stop)], self.d_sae

    def search(
        self, query: str, limit: int, offset: int, order: str | None = None
    ) -> tuple[list[Feature], int]:
        """Features whose label matches, and how many match; all for a blank query.

        Args:
            query: as in `sae.feature_search`.
            limit: how many at most.
            offset: how many to pass over.
            order: as for `page`; None for the best match first.
        """
        if not query.strip():
            return self.page(limit, offset, order)
        if order is None:
            indices, total = self._loaded().labels.search(query, limit, offset)
            return [self._row(index) for index in indices], total
        indices, total = self._loaded().labels.search(query, self.d_sae, 0)
        matching = ordered(map(self._row, indices), order)
        return matching[offset : offset + limit], total

    def _ranking(self, order: str) -> list[int]:
        """The indices of all features in an order, sorted once."""
        with self._lock:
            known = self._rankings.get(order)
        if known is None:
            known = [f.index for f in ordered(map(self._row, range(self.d_sae)), order)]
            with self._lock:
                self._rankings[order] = known
        return known

    def _row(self, index: int) -> Feature:
        if not 0 <= index < self.d_sae:
            raise IndexError(f"feature {index} not in [0, {self.d_sae})")
        return self._loaded().features.get(index) or Feature(index)

    def _loaded(self) -> _Table:
        with self._lock:
            if self._table is None:
                table = _read(self.path, self.d_sae)
                self._table = table if self._maxima is None else _with_maxima(table, self._maxima())
            return self._table


def _find(path: Path) -> Path | None:
    """`WEIGHTS.features.jsonl` or `features.jsonl` beside the weights, or above `checkpoints`."""
    folder = path if path.is_dir() else path.parent
    candidates = [folder / FEATURES_NAME]
    if folder.name == CHECKPOINTS:
        candidates.append(folder.parent / FEATURES_NAME)
    try:
        weights = find_weights(path)
    except SAEError:
        # A folder of labels alone, or of the labels of one SAE among several.
        pass
    else:
        candidates.insert(0, weights.with_name(f"{weights.name}.{FEATURES_NAME}"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _contains(path: Path | None, pattern: re.Pattern[bytes]) -> bool:
    if path is None or path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return pattern.search(content) is not None


def _read(path: Path | None, d_sae: int) -> _Table:
    features: dict[int, Feature] = {}
    offsets: dict[int, int] = {}
    for where, offset, line in _lines(path):
        feature = _parse(where, line, d_sae)
        if feature.index in features:
            raise SAEError(f"{where}: feature {feature.index} is listed twice")
        offsets[feature.index] = offset
        features[feature.index] = Feature(
            feature.index,
            feature.label,
            feature.max_activation,
            feature.density,
            feature.output_score,
        )
    labels = ((index, f.label) for index, f in features.items() if f.label is not None)
    return _Table(features, offsets, LabelIndex(labels))


def _with_maxima(table: _Table, maxima: list[float]) -> _Table:
    features = {
        index: replace(table.features.get(index) or Feature(index), max_activation=maximum)
        for index, maximum in enumerate(maxima)
    }
    return replace(table, features=features)


def _lines(path: Path | None) -> Iterator[tuple[str, int, bytes]]:
    """(place, offset, line) of every line that is not blank."""
    if path is None:
        return
    with path.open("rb") as file:
        for number, offset, line in json_lines.lines(file, path):
            yield json_lines.place(path, number), offset, line


def _parse(where: str, line: bytes, d_sae: int) -> Feature:
    values = json_lines.parsed(where, line)
    index = values.get("index")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < d_sae:
        raise SAEError(f"{where}: index {index!r:.40} not in [0, {d_sae})")
    label = values.get("label")
    if label is not None and not isinstance(label, str):
        raise SAEError(f"{where}: label must be a string or null")
    return Feature(
        index=index,
        label=label or None,
        max_activation=json_lines.number_of(where, values, "max_activation"),
        density=json_lines.number_of(where, values, "density"),
        output_score=json_lines.number_of(where, values, "output_score"),
        examples=tuple(_examples(where, values.get("examples"))),
    )


def _examples(where: str, values: object) -> Iterator[Example]:
    if values is None:
        return
    if not isinstance(values, list):
        raise SAEError(f"{where}: examples must be a list")
    for value in values:
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise SAEError(f"{where}: an example must be an object with a text")
        yield Example(value["text"], json_lines.number_of(where, value, "activation"))
