"""How far beyond zero a few features must be taken to suppress a behaviour, and at what cost.

``python -m tests.bench.dose_search [out.json] [--behaviours NAME ...]``

The first one to four features of three orders (by attribution as in ``steering_effect``, as
``set_search`` grew its set, and the first of that before those of the other) are scaled by each of
`FACTORS`, which turns them round where they fire and leaves them alone elsewhere. On the contrast
prompts each is judged by the share of answers that show the behaviour plus the logarithm of the
cost; the `REPORTED` best whose cost is at most `MOST_COST` are judged on the held-out prompts, as
in ``steering_effect``. The first of them is what the search chose. Rows are kept in ``build/`` as
they are made: begun again, this goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any, Final

from tests.bench.chat_answers import REPETITION_PENALTY
from tests.bench.kept_rows import KeptRows
from tests.bench.record import RESULTS, Record, arguments
from tests.bench.set_search import SEARCHED_TOKENS, SIZE
from tests.bench.steering_answers import DTYPE, Bench, Field
from tests.bench.steering_effect import SUPPRESSED_TOKENS
from tests.bench.steering_prompts import BEHAVIOURS, Behaviour
from tests.bench.suppressed_answers import judged
from tests.bench.suppression import found_sets

FACTORS: Final = (0.0, -0.5, -1.0, -2.0, -4.0)
MOST_COST: Final = 1.33
REPORTED: Final = 3

Edit = Mapping[str, Any]


def scaled(edit: Edit) -> Field:
    """The field of an edit: its features, scaled by its factor."""
    return {
        "interventions": [
            {"feature": feature, "op": "scale", "value": edit["factor"]}
            for feature in edit["features"]
        ]
    }


def orders(behaviour: Behaviour) -> list[list[int]]:
    """The orders of features whose beginnings are tried."""
    attributed = found_sets(RESULTS / "steering_effect.json")[behaviour.name]
    searched = json.loads((RESULTS / "set_search.json").read_text(encoding="utf-8"))["rows"]
    grown = next(
        row["features"]
        for row in searched
        if row["behaviour"] == behaviour.name and len(row["features"]) == SIZE
    )
    both = [grown[0], *(feature for feature in attributed if feature != grown[0])]
    return [attributed, grown, both[:SIZE]]


def tried(behaviour: Behaviour) -> list[Edit]:
    """The edits to try, each once."""
    sets = {
        tuple(sorted(order[:size])): order[:size]
        for order in orders(behaviour)
        for size in range(1, SIZE + 1)
    }
    return [
        {"features": features, "factor": factor} for features in sets.values() for factor in FACTORS
    ]


def judged_edits(
    bench: Bench,
    behaviour: Behaviour,
    prompts: Sequence[str],
    edits: Sequence[Edit],
    max_tokens: int,
) -> list[dict[str, Any]]:
    """How often a behaviour shows with each edit, and at what cost."""
    rows = judged(bench, behaviour, prompts, [*map(scaled, edits)], max_tokens)
    return [{**edit, **row} for edit, row in zip(edits, rows, strict=True)]


def best(rows: Sequence[Mapping[str, Any]]) -> list[Edit]:
    """The best of what is cheap enough."""
    cheap = [row for row in rows if row["perplexity_ratio"] <= MOST_COST]
    cheap.sort(key=lambda row: row["shown"] + log(row["perplexity_ratio"]))
    return [{name: row[name] for name in ("features", "factor")} for row in cheap[:REPORTED]]


def main() -> None:
    """Search against every behaviour asked for, judge what is found and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--behaviours", nargs="+", default=["numbered lists"])
    args = parser.parse_args()
    bench = Bench()
    kept = KeptRows(Path("build") / "dose-search.json")
    record = Record(
        "dose_search",
        "A few features scaled below zero against a behaviour: searched, then held out.",
        {"dtype": DTYPE, "repetition_penalty": REPETITION_PENALTY, "size": SIZE,
         "factors": FACTORS, "most_cost": MOST_COST},
    )  # fmt: skip
    rows: dict[str, Any] = record.kept.setdefault("rows", {})
    for behaviour in BEHAVIOURS:
        if behaviour.name not in args.behaviours:
            continue
        searched = kept.of(
            f"{behaviour.name} searched",
            judged_edits, bench, behaviour, behaviour.contrast, tried(behaviour), SEARCHED_TOKENS,
        )  # fmt: skip
        chosen = best(searched)
        held_out = kept.of(
            f"{behaviour.name} held out",
            judged_edits, bench, behaviour, behaviour.held_out, chosen, SUPPRESSED_TOKENS,
        )  # fmt: skip
        for edit, row in zip(chosen, held_out, strict=True):
            on_search = next(one for one in searched if edit.items() <= one.items())
            record.add(
                behaviour=behaviour.name, features=", ".join(map(str, edit["features"])),
                factor=edit["factor"], searched_unsteered=on_search["unsteered"],
                searched=on_search["shown"], searched_cost=on_search["perplexity_ratio"],
                unsteered=row["unsteered"], shown=row["shown"],
                perplexity_ratio=row["perplexity_ratio"], repeated=row["repeated"],
            )  # fmt: skip
        for one in searched:
            one.pop("answers", None)
        rows[behaviour.name] = {"searched": searched, "held_out": held_out}
    bench.engine.shut_down()
    record.save(args.json)


if __name__ == "__main__":
    main()
