"""What ``suggest`` finds: for ten behaviours, and against the suppression sets that were searched.

``python -m tests.bench.suggestions [out.json] [--sae FOLDER] [--parts dosed behaviours suppress]``

Dosed. Numbered lists with the edits that ``suppression`` found at three times the KL of ``reread``,
in answers as long as those of ``steering_effect`` and with their cost.

Behaviours. For each of `PAIRS`, wanted and unwanted answers to the same prompts: the gain in the
difference of their log-likelihoods on the half that was held out, at a KL of 0.1 on `NEUTRAL` of
the passages that ship with the project.

Suppress. For each of `BEHAVIOURS` of ``steering_effect``, unsteered answers to its contrast prompts
that do not show it are wanted and those that do are not; what is suggested, at most four edits at
the same KL, is judged on the held-out prompts as the sets of ``steering_effect`` were: share of 16
answers of 80 tokens that show the behaviour, and cost. Rows are kept in ``build/`` as they are
made: begun again, this goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from steering.studies.neutral import neutral_passages
from steering.vllm.offline_studies import OfflineStudies
from tests.bench.chat_answers import REPETITION_PENALTY
from tests.bench.demo_engine import SAE, name_of_result
from tests.bench.kept_rows import KeptRows
from tests.bench.record import RESULTS, Record, arguments
from tests.bench.steering_answers import DTYPE, SAE_NAME, Bench, Field
from tests.bench.steering_effect import SUPPRESSED_TOKENS
from tests.bench.steering_prompts import BEHAVIOURS, Behaviour
from tests.bench.suggestion_texts import PAIRS
from tests.bench.suppressed_answers import judged
from tests.bench.suppression import texts

PARTS: Final = ("dosed", "behaviours", "suppress")
DOSED: Final = "numbered lists"
BUDGET: Final = 0.1
#: Passages of the budget.
NEUTRAL: Final = 1
#: Of each side of a behaviour to suppress, answers at most, and their tokens.
MOST_TEXTS: Final = 6
FITTED_TOKENS: Final = 30


def asked(positive: list[dict[str, Any]], negative: list[dict[str, Any]]) -> dict[str, Any]:
    """The body of a suggestion."""
    return {
        "positive": positive,
        "negative": negative,
        "sae": SAE_NAME,
        "budget": BUDGET,
        "neutral": [{"prompt": passage} for passage in neutral_passages()[:NEUTRAL]],
    }


def suggested(studies: OfflineStudies, body: dict[str, Any]) -> dict[str, Any]:
    """What is suggested, without all that was tried."""
    answer = studies.run("suggest", body)
    return {**answer, "tried": len(answer["tried"])}


def of_pairs(studies: OfflineStudies, name: str) -> dict[str, Any]:
    """What is suggested for one of `PAIRS`."""
    sides: list[list[dict[str, Any]]] = [[], []]
    for prompt, *completions in PAIRS[name]:
        for side, completion in zip(sides, completions, strict=True):
            messages = [{"role": "user", "content": prompt}]
            side.append({"messages": messages, "completion": completion})
    return suggested(studies, asked(*sides))


def of_suppression(bench: Bench, studies: OfflineStudies, behaviour: Behaviour) -> dict[str, Any]:
    """What is suggested against a behaviour, and what it does on the held-out prompts."""
    prompts = behaviour.contrast
    found = bench.answers(prompts, [None] * len(prompts), SUPPRESSED_TOKENS, scored=False)
    cut = [
        {**text, "completion": text["completion"][:FITTED_TOKENS]} for text in texts(found)
    ]  # of a list the beginning says what it is
    shown = [behaviour.shown_in(answer.text) for answer in found]
    sides = [
        [text for text, its in zip(cut, shown, strict=True) if its is wanted][:MOST_TEXTS]
        for wanted in (False, True)
    ]
    if min(map(len, sides)) < 2:
        return {"suggested": None, "positive": len(sides[0]), "negative": len(sides[1])}
    made = suggested(studies, asked(*sides))
    row: dict[str, Any] = {"suggested": made, "positive": len(sides[0]), "negative": len(sides[1])}
    judged = on_held_out(bench, behaviour, {"suggested": made["steering"]})
    return {**row, **judged["suggested"]}


def on_held_out(
    bench: Bench, behaviour: Behaviour, steerings: Mapping[str, Field | None]
) -> dict[str, Any]:
    """How often a behaviour shows with each edit on its held-out prompts, and at what cost."""
    fields = [*steerings.values()]
    rows = judged(bench, behaviour, behaviour.held_out, fields, SUPPRESSED_TOKENS)
    return dict(zip(steerings, rows, strict=True))


def dosed(bench: Bench) -> dict[str, Any]:
    """Numbered lists with the edits that ``suppression`` found."""
    behaviour = next(one for one in BEHAVIOURS if one.name == DOSED)
    rows = json.loads((RESULTS / "suppression.json").read_text(encoding="utf-8"))["rows"]
    steerings = {
        row["edit"]: row["steering"]
        for row in rows
        if row["behaviour"] == DOSED and "3 x" in row["edit"]
    }
    return on_held_out(bench, behaviour, steerings)


def shown_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a row of `on_held_out`."""
    return {name: row.get(name) for name in ("unsteered", "shown", "perplexity_ratio")}


def main() -> None:
    """Suggest for everything asked for and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--sae", type=Path, default=SAE)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    bench = Bench(args.sae)
    studies = OfflineStudies(bench.engine.llm)
    kept = KeptRows(Path("build") / f"suggestions-{args.sae.name}.json")
    record = Record(
        name_of_result("suggestions", args.sae),
        "What suggest finds at a KL of 0.1: log-likelihoods held out, and behaviours suppressed.",
        {"sae": args.sae.name, "dtype": DTYPE, "repetition_penalty": REPETITION_PENALTY,
         "budget": BUDGET, "passages": NEUTRAL},
    )  # fmt: skip
    path = args.json or RESULTS / f"{record.name}.json"
    before = json.loads(path.read_text()) if path.exists() else {"results": [], "rows": {}}
    record.results += [row for row in before["results"] if row["part"] not in args.parts]
    rows: dict[str, Any] = record.kept.setdefault("rows", before["rows"])

    def put(key: str, row: dict[str, Any], **told: Any) -> None:
        rows[key] = row
        record.add(**told)
        record.save(path)

    if "dosed" in args.parts:
        for name, row in kept.of("dosed", dosed, bench).items():
            put(f"dosed {name}", row, part="dosed", what=f"{DOSED}, {name}", **shown_of(row))
    if "behaviours" in args.parts:
        for name in PAIRS:
            key = f"behaviour {name}"
            row = kept.of(key, of_pairs, studies, name)
            put(key, row, part="behaviours", what=name, **gain_of(row))
    if "suppress" in args.parts:
        for behaviour in BEHAVIOURS:
            key = f"suppress {behaviour.name}"
            row = kept.of(key, of_suppression, bench, studies, behaviour)
            put(key, row, part="suppress", what=behaviour.name, **shown_of(row))
    bench.engine.shut_down()


def gain_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of what was suggested."""
    return {
        "kl": row["kl"],
        "edits": len((row["steering"] or {}).get("interventions", ())),
        **{half: row[half]["after"] - row[half]["before"] for half in ("fit", "held_out")},
    }


if __name__ == "__main__":
    main()
