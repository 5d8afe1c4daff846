"""Sets of features that suppress a behaviour when they are switched off together, grown by trying.

``python -m tests.bench.set_search [out.json] [--behaviours NAME ...]``

``steering_effect`` takes the first features of a ranking, whatever they do together. Here a set
grows by one feature at a time. The candidates are the sixteen that rank first there by contrast and
the sixteen by attribution; each is ablated beside the set, and the one is kept that leaves the
least sum of the share of answers that show the behaviour and the logarithm of the cost, on the
contrast prompts. Each size is then judged on the held-out prompts, as in ``steering_effect``:
answers of 80 tokens, cost in perplexity under the unsteered model. Rounds are kept in ``build/`` as
they are made: begun again, this goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any, Final

from tests.bench.chat_answers import REPETITION_PENALTY
from tests.bench.kept_rows import KeptRows
from tests.bench.record import RESULTS, Record, arguments
from tests.bench.steering_answers import DTYPE, Bench, Field
from tests.bench.steering_effect import SUPPRESSED_TOKENS
from tests.bench.steering_prompts import BEHAVIOURS, Behaviour
from tests.bench.suppressed_answers import judged

SIZE: Final = 4
#: Of an answer while a set grows.
SEARCHED_TOKENS: Final = 60


def ablated(features: Sequence[int]) -> Field:
    """The field that switches features off."""
    return {"interventions": [{"feature": feature, "op": "ablate"} for feature in features]}


def candidates(behaviour: Behaviour) -> list[int]:
    """The first sixteen features of both rankings of ``steering_effect``."""
    rows = json.loads((RESULTS / "steering_effect.json").read_text(encoding="utf-8"))["rows"]
    ranked = [
        row["features"]
        for row in rows
        if row.get("behaviour") == behaviour.name and row["features"]
    ]
    return sorted({feature for features in ranked for feature in features})


def judged_sets(
    bench: Bench,
    behaviour: Behaviour,
    prompts: Sequence[str],
    sets: Sequence[Sequence[int]],
    max_tokens: int,
) -> list[dict[str, Any]]:
    """How often a behaviour shows with each set switched off, and at what cost."""
    rows = judged(bench, behaviour, prompts, [*map(ablated, sets)], max_tokens)
    return [{"features": list(features), **row} for features, row in zip(sets, rows, strict=True)]


def grown(bench: Bench, behaviour: Behaviour, kept: Sequence[int]) -> dict[str, Any]:
    """The set with one feature more, and how every candidate did beside it."""
    sets = [[*kept, feature] for feature in candidates(behaviour) if feature not in kept]
    tried = judged_sets(bench, behaviour, behaviour.contrast, sets, SEARCHED_TOKENS)
    for row in tried:
        del row["answers"]
    best = min(tried, key=lambda row: row["shown"] + log(row["perplexity_ratio"]))
    return {**best, "tried": tried}


def main() -> None:
    """Grow a set against every behaviour asked for, judge its sizes and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--behaviours", nargs="+", default=[one.name for one in BEHAVIOURS])
    args = parser.parse_args()
    bench = Bench()
    kept = KeptRows(Path("build") / "set-search.json")
    record = Record(
        "set_search",
        "Features switched off together against a behaviour, the set grown by trying.",
        {"dtype": DTYPE, "repetition_penalty": REPETITION_PENALTY, "size": SIZE},
    )
    all_rows: list[dict[str, Any]] = record.kept.setdefault("rows", [])
    for behaviour in BEHAVIOURS:
        if behaviour.name not in args.behaviours:
            continue
        features: list[int] = []
        for size in range(1, SIZE + 1):
            row = kept.of(f"{behaviour.name} {size}", grown, bench, behaviour, features)
            features = row["features"]
        sets = [features[:size] for size in range(1, SIZE + 1)]
        rows = kept.of(
            f"{behaviour.name} held out",
            judged_sets, bench, behaviour, behaviour.held_out, sets, SUPPRESSED_TOKENS,
        )  # fmt: skip
        for row in rows:
            figures = {name: row[name] for name in ("unsteered", "shown", "perplexity_ratio")}
            record.add(
                behaviour=behaviour.name,
                features=", ".join(map(str, row["features"])),
                **figures,
            )
            all_rows.append({"behaviour": behaviour.name, **row})
        record.save(args.json)
    bench.engine.shut_down()


if __name__ == "__main__":
    main()
