"""Put labels into `features.jsonl`, each with how specific it is on text kept out of training.

    python -m sae.training.labels --model FOLDER --work FOLDER --sae FOLDER

reads ``labels.jsonl`` beside the weights, which a person writes from ``contexts.HOOK.txt``
(see `sae.training.evaluate`), one label a line:

    {"index": 1023, "label": "French text", "test": "\\\\b(le|les|des)\\\\b", "in_context": 3}

``test`` is a regular expression, for capitals and small letters alike, that says in public what
the label claims; ``in_context`` is how often it must match for a context to pass, 1 if left out.
A label's specificity is the share of strong held-out contexts that pass its test. Strong are those
in which the feature is at half its recorded maximum or above, one context a window; the strongest
`STRONGEST` of them count. ``by_chance`` is the share of arbitrary held-out contexts that pass,
without which the first figure says little. A feature that is strong in fewer than `FEWEST` windows
has neither figure.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from sae.features import FeatureTable
from sae.sae import SAE, open_sae
from sae.source import SAEReference
from sae.training.activations import Window, places, stored, windows
from sae.training.corpus import read
from sae.training.evaluate import AFTER, BEFORE, CHUNK

STRONGEST: Final = 50
STRONG: Final = 0.5  # of the recorded maximum
FEWEST: Final = 5
CHANCE_CONTEXTS: Final = 1000
FIGURES: Final = ("specificity", "by_chance", "contexts")


@dataclass(frozen=True)
class Label:
    """A label with the test of what it claims.

    Attributes:
        index: of the feature.
        label: what the feature fires on.
        test: a regular expression.
        kind: "topic", "language", "code", ..., so that a choice of features can be varied.
        in_context: matches that make a context pass.
        in_answer: matches that make a steered answer pass, which is longer.
    """

    index: int
    label: str
    test: str
    kind: str = "topic"
    in_context: int = 1
    in_answer: int = 2

    def matches(self, text: str) -> int:
        """How often the test matches `text`."""
        return sum(1 for _ in re.finditer(self.test, text, re.IGNORECASE))


def read_labels(path: Path) -> list[Label]:
    """The labels in a file.

    Raises:
        ValueError: if two labels are of one feature.
    """
    labels = [Label(**json.loads(line)) for line in path.read_text("utf-8").splitlines() if line]
    if len({label.index for label in labels}) < len(labels):
        raise ValueError(f"{path}: two labels of one feature")
    return labels


def context(tokenizer: Any, window: Window, position: int) -> str:
    """The text around one token, that token included, as the tests see it."""
    text: str = tokenizer.decode(window.ids[max(0, position - BEFORE) : position + 1 + AFTER])
    return text


def strongest(f: torch.Tensor, window: torch.Tensor, least: float, count: int) -> list[int]:
    """Rows of the largest activations, one a window, strongest first.

    Args:
        f: `[num_rows]`, one feature's activations.
        window: `[num_rows]`, the window of each row.
        least: none below this.
        count: at most so many.
    """
    best: dict[int, int] = {}
    order = f.argsort(descending=True)
    for row in order[: int((f >= least).sum())].tolist():
        best.setdefault(int(window[row]), row)
        if len(best) == count:
            break
    return list(best.values())


def specificity(label: Label, contexts: Sequence[str]) -> float:
    """Share of `contexts` that pass the label's test."""
    return sum(label.matches(text) >= label.in_context for text in contexts) / len(contexts)


def measured(
    sae: SAE,
    tokenizer: Any,
    rows: torch.Tensor,
    place: torch.Tensor,
    cuts: list[Window],
    labels: Sequence[Label],
    table: FeatureTable,
) -> list[dict[str, Any]]:
    """For each label its ``specificity``, ``by_chance`` and number of ``contexts``.

    Args:
        sae: whose features are labelled.
        tokenizer: the model's.
        rows: `[num_rows, d_in]`, held out.
        place: `[num_rows, 2]`, window and position of each row.
        cuts: the windows.
        labels: the labels.
        table: with the maximum activation of every feature that has a label.
    """
    index = [label.index for label in labels]
    f = torch.cat([sae.activations(chunk.float(), index) for chunk in torch.split(rows, CHUNK)])

    def text(row: int) -> str:
        window, position = place[row].tolist()
        return context(tokenizer, cuts[window], position)

    step = max(1, len(rows) // CHANCE_CONTEXTS)
    arbitrary = [text(row) for row in range(0, len(rows), step)]
    found = []
    for column, label in enumerate(labels):
        largest = table.max_activation(label.index)
        assert largest is not None
        strong = strongest(f[:, column], place[:, 0], STRONG * largest, STRONGEST)
        contexts = [text(row) for row in strong]
        few = len(contexts) < FEWEST
        found.append(
            {
                "specificity": None if few else round(specificity(label, contexts), 3),
                "by_chance": None if few else round(specificity(label, arbitrary), 3),
                "contexts": len(contexts),
            }
        )
    return found


def write_labels(path: Path, labels: Sequence[Label], found: Sequence[dict[str, Any]]) -> None:
    """Put labels and figures into a `features.jsonl`; a feature not among `labels` loses its own.

    Raises:
        ValueError: if a label is of a feature that the file does not have.
    """
    by_index = {label.index: (label, row) for label, row in zip(labels, found, strict=True)}
    features = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if unknown := by_index.keys() - {feature["index"] for feature in features}:
        raise ValueError(f"{path}: no feature {sorted(unknown)}")
    with path.open("w", encoding="utf-8") as file:
        for feature in features:
            label, figures = by_index.get(feature["index"], (None, dict.fromkeys(FIGURES)))
            feature |= {"label": None if label is None else label.label, **figures}
            known = {key: value for key, value in feature.items() if value is not None}
            file.write(json.dumps(known, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sae", type=Path, required=True)
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    sae = open_sae(SAEReference(name="sae", source=str(arguments.sae)))
    labels = read_labels(arguments.sae / "labels.jsonl")
    found = measured(
        sae,
        tokenizer,
        stored(arguments.work, "held_out", sae.card.reads),
        places(arguments.work, "held_out", sae.card.reads),
        windows(tokenizer, read(arguments.work / "held_out.jsonl")),
        labels,
        FeatureTable.open(arguments.sae, sae.card.d_sae),
    )
    for label, figures in zip(labels, found, strict=True):
        print(label.index, label.label, figures)
    write_labels(arguments.sae / "features.jsonl", labels, found)


if __name__ == "__main__":
    main()
