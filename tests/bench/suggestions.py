"""What ``suggest`` finds: for ten behaviours, and against the suppression sets that were searched.

``python -m tests.bench.suggestions [out.json] [--sae FOLDER] [--parts behaviours suppress]``

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
from pathlib import Path
from statistics import mean
from typing import Any, Final

from steering.studies.neutral import neutral_passages
from steering.vllm.offline_studies import OfflineStudies
from tests.bench.demo_engine import SAE
from tests.bench.kept_rows import KeptRows
from tests.bench.record import RESULTS, Record, arguments
from tests.bench.steering_answers import DTYPE, REPETITION_PENALTY, SAE_NAME, Bench, cost
from tests.bench.steering_effect import SUPPRESSED_TOKENS
from tests.bench.steering_prompts import BEHAVIOURS, Behaviour
from tests.bench.suggestion_texts import PAIRS
from tests.bench.suppression import texts

PARTS: Final = ("behaviours", "suppress")
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
    prompts, held_out = behaviour.contrast, behaviour.held_out
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
    n = len(held_out)
    answers = bench.answers([*held_out] * 2, [None] * n + [made["steering"]] * n, SUPPRESSED_TOKENS)
    unsteered, steered = answers[:n], answers[n:]
    return row | {
        "unsteered": mean(behaviour.shown_in(answer.text) for answer in unsteered),
        "shown": mean(behaviour.shown_in(answer.text) for answer in steered),
        "perplexity_ratio": cost(steered, unsteered),
        "repeated": mean(answer.repeated for answer in steered),
        "answers": [answer.text for answer in steered],
    }


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
        "suggestions",
        "What suggest finds at a KL of 0.1: log-likelihoods held out, and behaviours suppressed.",
        {"sae": args.sae.name, "dtype": DTYPE, "repetition_penalty": REPETITION_PENALTY,
         "budget": BUDGET, "passages": NEUTRAL},
    )  # fmt: skip
    rows: dict[str, Any] = {}
    if "suppress" in args.parts:
        for behaviour in BEHAVIOURS:
            row = kept.of(
                f"suppress {behaviour.name}",
                of_suppression,
                bench,
                studies,
                behaviour,
            )
            rows[f"suppress {behaviour.name}"] = row
            figures = {name: row.get(name) for name in ("unsteered", "shown", "perplexity_ratio")}
            record.add(part="suppress", what=behaviour.name, **figures)
    if "behaviours" in args.parts:
        for name in PAIRS:
            row = kept.of(f"behaviour {name}", of_pairs, studies, name)
            rows[f"behaviour {name}"] = row
            held_out = row["held_out"]
            record.add(
                part="behaviours", what=name, kl=row["kl"],
                edits=len((row["steering"] or {}).get("interventions", ())),
                fit=row["fit"]["after"] - row["fit"]["before"],
                held_out=held_out["after"] - held_out["before"],
            )  # fmt: skip
    bench.engine.shut_down()
    path = args.json or RESULTS / "suggestions.json"
    record.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
