"""What steering does to the text: features amplified, behaviours suppressed, and at what cost.

``python -m tests.bench.steering_effect [out.json] [--parts amplify suppress] [--sae FOLDER]``

Amplify. Every labelled feature of an SAE, by default the one that the demo asks, is clamped to 1.5
times its maximum activation on the prompts `SELECTION`, and to 2 times if that does too little;
those that work there, at most so many of a kind as `MOST_OF_A_KIND` says, are reported on the
prompts `REPORT` at 1, 1.5 and 2 times. An answer is on topic if its label's test (``labels.jsonl``
beside the weights, written before) matches as often as that file says. Rows are kept in ``build/``
as they are made: begun again, this goes on.

Suppress. For each of `BEHAVIOURS`, features are ranked on the answers to its contrast prompts, and
the first 1, 4 and 16 are clamped to 0 on the held-out prompts. Ranked by "contrast": mean
activation on answers that show the behaviour less that on answers that do not. Ranked by
"attribution": how much log-probability the behaviour would lose if the feature were 0, to first
order: activation times the gradient of the log-probability of the words that the behaviour's test
matches, along the decoder row, over all tokens up to them.

Cost is the perplexity of the answers under the unsteered model in relation to that of its own
answers to the same prompts; "repeated" is the share of an answer's word trigrams that occurred
before in it. Answers are greedy with a repetition penalty, as the demo's: plain greedy text of this
model degenerates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

import numpy as np

from sae.arrays import FloatArray
from sae.discovery import contrast, pooled, strongest
from sae.features import FeatureTable
from sae.training.labels import Label, read_labels
from tests.bench.chat_answers import REPETITION_PENALTY
from tests.bench.demo_engine import SAE, name_of_result
from tests.bench.kept_rows import KeptRows
from tests.bench.record import RESULTS, Record, arguments
from tests.bench.steering_answers import (
    DTYPE,
    SAE_NAME,
    Answer,
    Bench,
    Field,
    cost,
    mean_nll,
)
from tests.bench.steering_prompts import BEHAVIOURS, REPORT, SELECTION, Behaviour

PARTS: Final = ("amplify", "suppress")

AMPLIFIED_TOKENS: Final = 40
SELECTED_AT: Final = 1.5
SELECTED_AT_MOST: Final = 2.0
STRENGTHS: Final = (1.0, 1.5, 2.0)
#: A feature works if so many answers are on topic, so many of the unsteered ones at most, and the
#: text neither repeats itself nor costs more than this.
LEAST_ON_TOPIC: Final = 0.5
MOST_UNSTEERED: Final = 0.25
MOST_REPEATED: Final = 0.2
MOST_COST: Final = 10.0
MOST_OF_A_KIND: Final = {"topic": 12}
MOST_OF_ANOTHER_KIND: Final = 2
PICKED: Final = 16

#: Cases whose answers are made in one batch.
AT_ONCE: Final = 16

SUPPRESSED_TOKENS: Final = 80
SET_SIZES: Final = (1, 4, 16)
#: With fewer answers on one side the contrast is against the answers to all other prompts.
FEWEST: Final = 4
READ_FEATURES: Final = 64


def amplified(feature: int, strength: float) -> Field:
    """Clamp a feature to so many times its maximum activation."""
    return {
        "interventions": [{"feature": feature, "op": "clamp", "value": strength, "unit": "max_act"}]
    }


def suppressed(features: Sequence[int]) -> Field:
    """Clamp features to zero."""
    return {"interventions": [{"feature": f, "op": "clamp", "value": 0} for f in features]}


def on_topic(label: Label, answers: Sequence[Answer]) -> float:
    """Share of answers in which the label's test matches as often as it asks for."""
    return mean(label.matches(answer.text) >= label.in_answer for answer in answers)


def effect(
    label: Label, answers: Sequence[Answer], unsteered: Sequence[Answer]
) -> dict[str, float]:
    """The figures of one feature at one strength."""
    return {
        "on_topic": on_topic(label, answers),
        "on_topic_unsteered": on_topic(label, unsteered),
        "perplexity_ratio": cost(answers, unsteered),
        "repeated": mean(answer.repeated for answer in answers),
    }


def works(figures: Mapping[str, float]) -> bool:
    """Whether a feature steers visibly and coherently."""
    return (
        figures["on_topic"] >= LEAST_ON_TOPIC
        and figures["on_topic_unsteered"] <= MOST_UNSTEERED
        and figures["repeated"] <= MOST_REPEATED
        and figures["perplexity_ratio"] <= MOST_COST
    )


def picked(labels: Sequence[Label], figures: Sequence[Mapping[str, float]]) -> list[Label]:
    """Of the features that work, the most on topic (the cheapest of equals), not all of a kind."""
    order = sorted(
        (label_figures for label_figures in zip(labels, figures, strict=True)
         if works(label_figures[1])),
        key=lambda pair: (-pair[1]["on_topic"], pair[1]["perplexity_ratio"]),
    )  # fmt: skip
    taken: list[Label] = []
    for label, _ in order:
        of_its_kind = sum(other.kind == label.kind for other in taken)
        if of_its_kind < MOST_OF_A_KIND.get(label.kind, MOST_OF_ANOTHER_KIND):
            taken.append(label)
    return taken[:PICKED]


def amplify(
    bench: Bench, labels: Sequence[Label], record: Record, kept: KeptRows
) -> list[dict[str, Any]]:
    """Choose features on one set of prompts and report them on the other.

    Returns:
        A row for every feature, set of prompts and strength.
    """
    rows = []

    def measure(
        chosen: Sequence[Label], prompts: Sequence[str], strengths: Sequence[float], name: str
    ) -> list[dict[str, Any]]:
        unsteered = bench.answers(prompts, [None] * len(prompts), AMPLIFIED_TOKENS)
        cases = [(label, strength) for label in chosen for strength in strengths]
        for start in range(0, len(cases), AT_ONCE):
            asked = [
                (label, strength)
                for label, strength in cases[start : start + AT_ONCE]
                if f"{name} {label.index} {strength}" not in kept
            ]
            if not asked:
                continue
            fields = [amplified(label.index, strength) for label, strength in asked]
            answers = bench.answers(
                [*prompts] * len(asked), [f for f in fields for _ in prompts], AMPLIFIED_TOKENS
            )
            for i, (label, strength) in enumerate(asked):
                its = answers[i * len(prompts) : (i + 1) * len(prompts)]
                row = {
                    "part": "amplify",
                    "prompts": name,
                    "feature": label.index,
                    "label": label.label,
                    "strength": strength,
                    **effect(label, its, unsteered),
                    "nll": mean_nll(its),
                    "answers": [answer.text for answer in its],
                }
                kept.put(f"{name} {label.index} {strength}", row)
                print(name, label.index, label.label, strength, row["on_topic"], flush=True)
        found = [kept[f"{name} {label.index} {strength}"] for label, strength in cases]
        rows.extend(found)
        return found

    tried = dict(zip(labels, measure(labels, SELECTION, [SELECTED_AT], "selection"), strict=True))
    work = mean(works(figures) for figures in tried.values())
    again = [
        label
        for label, figures in tried.items()
        if not works(figures) and figures["perplexity_ratio"] <= MOST_COST
    ]
    tried |= zip(again, measure(again, SELECTION, [SELECTED_AT_MOST], "selection"), strict=True)
    chosen = picked(labels, list(tried.values()))
    record.settings |= {
        "tried": len(labels),
        f"share_that_works_at_{SELECTED_AT:g}": work,
        f"share_that_works_at_{SELECTED_AT_MOST:g}_at_most": mean(map(works, tried.values())),
    }
    reported = measure(chosen, REPORT, STRENGTHS, "report")
    for i, label in enumerate(chosen):
        of_label = reported[i * len(STRENGTHS) : (i + 1) * len(STRENGTHS)]
        for strength, figures in zip(STRENGTHS, of_label, strict=True):
            record.add(
                part="amplify", what=f"{label.index}: {label.label}",
                edit=f"clamp {strength:g} x max", shown=figures["on_topic"],
                unsteered=figures["on_topic_unsteered"],
                perplexity_ratio=figures["perplexity_ratio"], repeated=figures["repeated"],
            )  # fmt: skip
    return rows


def activations(answer: Answer, d_sae: int) -> FloatArray:
    """Mean activation of every feature over an answer's tokens: `[d_sae]`."""
    assert answer.read is not None
    generated = [token for token in answer.read["tokens"] if token["phase"] == "generation"]
    f = np.zeros((max(1, len(generated)), d_sae), dtype=np.float32)
    for of_token, token in zip(f, generated, strict=False):
        for feature, value in token["features"]:
            of_token[feature] = value
    return pooled(f, "mean")


def rankings(bench: Bench, behaviour: Behaviour, others: Sequence[Answer]) -> dict[str, list[int]]:
    """Features in the order in which each way of ranking would suppress them.

    Args:
        bench: that answers.
        behaviour: with answers that show it and, here or among `others`, some that do not.
        others: answers to other prompts.

    Returns:
        For "contrast" and "attribution" all features; empty if no answer shows the behaviour.
    """
    with_it = [answer for answer in others if behaviour.shown_in(answer.text)]
    without = [answer for answer in others if not behaviour.shown_in(answer.text)]
    own = [answer for answer in others if answer.question in behaviour.contrast]
    own_with = [answer for answer in own if behaviour.shown_in(answer.text)]
    own_without = [answer for answer in own if not behaviour.shown_in(answer.text)]
    if min(len(own_with), len(own_without)) >= FEWEST:
        with_it, without = own_with, own_without
    if not with_it or not without:
        return {}
    d_sae = bench.sae.card.d_sae
    difference = contrast(
        np.stack([activations(answer, d_sae) for answer in with_it]),
        np.stack([activations(answer, d_sae) for answer in without]),
    ).difference
    attributed = np.stack(
        [bench.attribution(answer, behaviour.found_in(answer.text)) for answer in with_it]
    ).mean(axis=0, dtype=np.float64)
    return {
        "contrast": strongest(difference, difference, d_sae).tolist(),
        "attribution": strongest(attributed, attributed, d_sae).tolist(),
    }


def suppress(bench: Bench, table: FeatureTable, record: Record) -> list[dict[str, Any]]:
    """Find each behaviour's features and clamp the first few to zero.

    Returns:
        A row for every behaviour and set of features.
    """
    questions = list(dict.fromkeys(q for behaviour in BEHAVIOURS for q in behaviour.contrast))
    read = {"read": {"sae": SAE_NAME, "top_k": READ_FEATURES}}
    contrasted = bench.answers(questions, [read] * len(questions), SUPPRESSED_TOKENS)
    rows = []
    for behaviour in BEHAVIOURS:
        ranked = rankings(bench, behaviour, contrasted)
        sets = [(name, order[:n]) for name, order in ranked.items() for n in SET_SIZES]
        fields: list[Field | None] = [None, *(suppressed(features) for _, features in sets)]
        n = len(behaviour.held_out)
        answers = bench.answers(
            [*behaviour.held_out] * len(fields),
            [field for field in fields for _ in range(n)],
            SUPPRESSED_TOKENS,
        )
        unsteered = mean(behaviour.shown_in(answer.text) for answer in answers[:n])
        for i, (name, features) in enumerate([("unsteered", []), *sets]):
            its = answers[i * n : (i + 1) * n]
            figures = {
                "shown": mean(behaviour.shown_in(answer.text) for answer in its),
                "unsteered": unsteered,
                "perplexity_ratio": cost(its, answers[:n]),
                "repeated": mean(answer.repeated for answer in its),
            }
            rows.append(
                {
                    "part": "suppress",
                    "behaviour": behaviour.name,
                    "ranked_by": name,
                    "features": features,
                    "labels": [table.label(feature) for feature in features],
                    **figures,
                    "answers": [answer.text for answer in its],
                }
            )
            if features:
                edit = f"{len(features)} to 0, by {name}"
                record.add(part="suppress", what=behaviour.name, edit=edit, **figures)
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="keeps the others")
    parser.add_argument("--sae", type=Path, default=SAE, help="a folder with labels.jsonl")
    args = parser.parse_args()
    name = name_of_result("steering_effect", args.sae)
    path = args.json or RESULTS / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"settings": {}}
    record = Record(
        name,
        "Share of answers that show what a feature is labelled with, or a behaviour; its cost.",
        {**kept["settings"], "sae": args.sae.name, "dtype": DTYPE,
         "repetition_penalty": REPETITION_PENALTY, "amplified_tokens": AMPLIFIED_TOKENS,
         "suppressed_tokens": SUPPRESSED_TOKENS},
    )  # fmt: skip
    for part in {*PARTS} - {*args.parts}:
        record.results += [row for row in kept.get("results", ()) if row["part"] == part]
    rows = [row for row in kept.get("rows", ()) if row["part"] not in args.parts]
    bench = Bench(args.sae)
    if "amplify" in args.parts:
        made = KeptRows(Path("build") / f"{name}.json")
        rows += amplify(bench, read_labels(args.sae / "labels.jsonl"), record, made)
    if "suppress" in args.parts:
        rows += suppress(bench, FeatureTable.open(args.sae, bench.sae.card.d_sae), record)
    bench.engine.shut_down()
    record.kept["rows"] = rows
    record.save(path)


if __name__ == "__main__":
    main()
