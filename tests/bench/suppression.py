"""Behaviours suppressed by ``ablate``, by ``ablate`` with ``reread``, and beyond zero at equal KL.

``python -m tests.bench.suppression [out.json] [--sae FOLDER] [--effects JSON]``

For each of `BEHAVIOURS` the four features by attribution that ``steering_effect`` found on the
contrast prompts. KL is that of the edit on the model's unsteered answers, over the answers' tokens.
``ablate`` and its ``reread`` have no strength, so the others take theirs: on the first 40 tokens of
the answers to every fourth contrast prompt ("found"), each is made as strong as costs the KL of
``reread`` (clamp alone: one below zero by nothing is ``ablate``) and three times that:

* ``clamp``: every feature at so many times minus its maximum, on every token;
* ``scale``: f' = (1 - m) f, beyond zero where the feature fires and nothing elsewhere;
* ``add``: so many times minus its maximum added on every token, whatever the feature reads.

All of it is reported on the held-out prompts: the share of 16 answers of 60 tokens that show the
behaviour, the share of repeated trigrams as in ``steering_effect``, and KL on the unsteered answers
to every other of these prompts. Rows are kept in ``build/`` as they are made: begun again, this
goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

from steering.vllm.offline_studies import OfflineStudies
from tests.bench.chat_answers import REPETITION_PENALTY
from tests.bench.demo_engine import SAE, name_of_result
from tests.bench.doses import doses, kls
from tests.bench.kept_rows import KeptRows
from tests.bench.record import RESULTS, Record, arguments
from tests.bench.steering_answers import DTYPE, Answer, Bench, Field
from tests.bench.steering_prompts import BEHAVIOURS, Behaviour

SET_SIZE: Final = 4
ANSWER_TOKENS: Final = 60
FOUND_TOKENS: Final = 40
#: What has a strength, and its budget in times the KL of ``ablate`` with ``reread``.
CASES: Final = (("clamp", 1), ("clamp", 3), ("scale", 3), ("add", 3))
#: An edit a feature whose strength is looked for, at a multiplier of 1.
DOSED: Final[Mapping[str, Mapping[str, Any]]] = {
    "clamp": {"op": "clamp", "value": -1, "unit": "max_act"},
    "scale": {"op": "scale", "value": 0},
    "add": {"op": "add", "value": -1, "unit": "max_act"},
}


def edits(features: Sequence[int], edit: Mapping[str, Any]) -> dict[str, Any]:
    """One edit of several features."""
    return {"interventions": [{"feature": feature, **edit} for feature in features]}


def undosed(features: Sequence[int]) -> dict[str, dict[str, Any]]:
    """``ablate`` as it is and with ``reread``."""
    ablated = edits(features, {"op": "ablate"})
    return {"ablate": ablated, "ablate, reread": {**ablated, "match": "reread"}}


def texts(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Answers as a study takes them."""
    return [{"prompt": answer.prompt, "completion": answer.tokens} for answer in answers]


def found_sets(effects: Path) -> dict[str, list[int]]:
    """The features of each behaviour by attribution."""
    rows = json.loads(effects.read_text(encoding="utf-8"))["rows"]
    return {
        row["behaviour"]: row["features"]
        for row in rows
        if row.get("ranked_by") == "attribution" and len(row["features"]) == SET_SIZE
    }


def dosed(
    bench: Bench, studies: OfflineStudies, behaviour: Behaviour, features: Sequence[int]
) -> dict[str, Any]:
    """The edits of a behaviour, those with a strength at their budgets, by name."""
    prompts = behaviour.contrast[::4]
    found = texts(bench.answers(prompts, [None] * len(prompts), FOUND_TOKENS, scored=False))
    steerings = undosed(features)
    of_undosed = dict(zip(steerings, kls(studies, found, list(steerings.values())), strict=True))
    made: dict[str, Any] = {
        name: {"steering": steering, "kl_found": of_undosed[name], "tries": 0}
        for name, steering in steerings.items()
    }
    asked = doses(
        studies,
        found,
        [edits(features, DOSED[op]) for op, _ in CASES],
        [budget * of_undosed["ablate, reread"] for _, budget in CASES],
    )
    for (op, budget), dose in zip(CASES, asked, strict=True):
        print(behaviour.name, op, budget, dose, flush=True)
        made[f"{op}, {budget} x KL of reread"] = {
            "steering": dose.steering,
            "kl_found": dose.kl,
            "tries": dose.tries,
        }
    return made


def reported(
    bench: Bench, studies: OfflineStudies, behaviour: Behaviour, made: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for the unsteered model and each edit, on the held-out prompts."""
    steerings = {name: one["steering"] for name, one in made.items() if one["steering"]}
    fields: list[Field | None] = [None, *steerings.values()]
    prompts, n = behaviour.held_out, len(behaviour.held_out)
    answers = bench.answers(
        [*prompts] * len(fields),
        [field for field in fields for _ in prompts],
        ANSWER_TOKENS,
        scored=False,
    )
    held_out = [0.0, *kls(studies, texts(answers[:n:2]), list(steerings.values()))]
    rows = []
    for i, (name, kl) in enumerate(zip(["unsteered", *steerings], held_out, strict=True)):
        its = answers[i * n : (i + 1) * n]
        rows.append(
            {
                "behaviour": behaviour.name,
                "edit": name,
                "shown": mean(behaviour.shown_in(answer.text) for answer in its),
                "kl": kl,
                "kl_found": made[name]["kl_found"] if name in made else 0.0,
                "repeated": mean(answer.repeated for answer in its),
                "steering": steerings.get(name),
                "answers": [answer.text for answer in its],
            }
        )
    return rows


def main() -> None:
    """Measure every behaviour and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--sae", type=Path, default=SAE)
    parser.add_argument("--effects", type=Path, default=RESULTS / "steering_effect.json")
    args = parser.parse_args()
    sets = found_sets(args.effects)
    bench = Bench(args.sae)
    studies = OfflineStudies(bench.engine.llm)
    kept = KeptRows(Path("build") / f"suppression-{args.sae.name}.json")
    record = Record(
        name_of_result("suppression", args.sae),
        "Behaviours shown in answers to held-out prompts, four features suppressed, at equal KL.",
        {"sae": args.sae.name, "dtype": DTYPE, "repetition_penalty": REPETITION_PENALTY,
         "tokens": ANSWER_TOKENS, "answers": len(BEHAVIOURS[0].held_out),
         "sets": json.dumps(sets)},
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for behaviour in BEHAVIOURS:
        features = sets[behaviour.name]
        made = kept.of(
            f"doses {behaviour.name}",
            dosed,
            bench,
            studies,
            behaviour,
            features,
        )
        of_behaviour = kept.of(
            f"answers {behaviour.name}",
            reported,
            bench,
            studies,
            behaviour,
            made,
        )
        for row in of_behaviour:
            record.add(
                **{k: v for k, v in row.items() if k not in ("steering", "answers", "kl_found")}
            )
        rows += of_behaviour
    bench.engine.shut_down()
    record.kept["rows"] = rows
    record.save(args.json)


if __name__ == "__main__":
    main()
