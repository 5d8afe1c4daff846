"""Full-text search over 65,536 labels: the time of a query, and of building the index.

``python -m tests.bench.label_search [out.json] [--full]``

Labels of eight words, three of them from five that a third of all labels have, five from 5,000 made
up. Queries: a word that a third of the labels have, the beginning of many words, a rare word, and
two phrases; 50 results each.
"""

from __future__ import annotations

import random
from time import perf_counter
from typing import Final

from sae.feature_search import LabelIndex
from tests.bench.record import Record, arguments, spread

LABELS: Final = 65_536
COMMON: Final = ("the", "references", "to", "music", "of")


def labels(words: list[str], choose: random.Random) -> list[str]:
    """As many labels as a published SAE of that width has features."""
    return [
        " ".join(choose.choices(COMMON, k=3) + choose.choices(words, k=5)) for _ in range(LABELS)
    ]


def main() -> None:
    """Time every query and write the JSON."""
    args = arguments(__doc__).parse_args()
    rounds = 50 if args.full else 10
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(5000)]
    texts = labels(words, choose)
    record = Record(
        "label_search",
        "Search over 65,536 labels, in milliseconds: medians (quartiles).",
        {"labels": LABELS, "rounds": rounds},
    )
    started = perf_counter()
    index = LabelIndex(enumerate(texts))
    built = 1e3 * (perf_counter() - started)
    record.add(query="(building the index)", found=LABELS, milliseconds=spread([built]))
    for query in ("music", "t", words[0], f"{words[0][:3]} music", "references to the music"):
        times = []
        for _ in range(rounds):
            started = perf_counter()
            _, found = index.search(query, 50, 0)
            times.append(1e3 * (perf_counter() - started))
        record.add(query=query, found=found, milliseconds=spread(times))
    record.save(args.json)


if __name__ == "__main__":
    main()
