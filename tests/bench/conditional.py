"""A style put on every answer, and only where a topic has come up: effect kept, cost saved.

``python -m tests.bench.conditional [out.json] [--sae FOLDER] [--style FEATURE]``

The style is a feature clamped to its maximum on generated tokens: that of the demo's README which
does most at that strength, and is on none of the topics. A topic's condition is found by
``contrast`` on the first half of its prompts against the first half of all others, at the largest
activation in each: the first feature by AUROC, above the midpoint of its two means. It is tried
with scope ``so_far`` and with scope ``prompt``.

Reported on the second halves, apart for prompts of the topic and for prompts on none: the share of
answers (40 tokens, as in ``steering_effect``) in which the style's label shows, by the label's own
test; KL of the edit on the unsteered answers, over their tokens; and the share of answers that are
not the unsteered ones, token by token. Rows are kept in ``build/`` as they are made: begun again,
this goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

from sae.training.labels import Label, read_labels
from steering.vllm.offline_studies import OfflineStudies
from tests.bench.conditional_prompts import TOPICS
from tests.bench.demo_engine import SAE, name_of_result
from tests.bench.doses import kls
from tests.bench.kept_rows import KeptRows
from tests.bench.record import Record, arguments
from tests.bench.steering_answers import DTYPE, SAE_NAME, Bench
from tests.bench.steering_effect import AMPLIFIED_TOKENS, on_topic
from tests.bench.suppression import texts

STYLE: Final = 4308
STRENGTH: Final = 1.0
SCOPES: Final = ("so_far", "prompt")
OTHER: Final = "other"


def first_half(prompts: Sequence[str]) -> Sequence[str]:
    """Where conditions are found."""
    return prompts[: len(prompts) // 2]


def second_half(prompts: Sequence[str]) -> Sequence[str]:
    """Where they are reported."""
    return prompts[len(prompts) // 2 :]


def condition(studies: OfflineStudies, topic: str) -> dict[str, Any]:
    """The feature that parts a topic's prompts from the others, and above what."""

    def asked(names: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {"messages": [{"role": "user", "content": prompt}]}
            for name in names
            for prompt in first_half(TOPICS[name])
        ]

    body = {
        "positive": asked([topic]),
        "negative": asked([name for name in TOPICS if name != topic]),
        "over": "prompt",
        "pool": "max",
        "top_k": 5,
    }
    found = studies.run("contrast", body, SAE_NAME)["positive"]
    best = found[0]
    return {
        "feature": best["feature"],
        "label": best["label"],
        "auroc": best["auroc"],
        "above": (best["mean_positive"] + best["mean_negative"]) / 2,
        "mean_positive": best["mean_positive"],
        "mean_negative": best["mean_negative"],
    }


def styled(feature: int, when: Mapping[str, Any] | None) -> dict[str, Any]:
    """A style on generated tokens, under a condition or not."""
    edit = {"feature": feature, "op": "clamp", "value": STRENGTH, "unit": "max_act"}
    positions = {"prompt": False}
    field: dict[str, Any] = {"interventions": [edit], "positions": positions}
    return field if when is None else {**field, "when": dict(when)}


def cases(style: int, conditions: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """By topic, the style without a condition and under the topic's in each scope."""
    found = {}
    for topic, one in conditions.items():
        fields = {"always": styled(style, None)}
        for scope in SCOPES:
            when = {"feature": one["feature"], "above": one["above"], "scope": scope}
            fields[scope] = styled(style, when)
        found[topic] = fields
    return found


def measured(
    bench: Bench,
    studies: OfflineStudies,
    prompts: Sequence[str],
    fields: Mapping[str, Mapping[str, Any]],
    label: Label,
) -> dict[str, Any]:
    """The figures of each field on prompts."""
    n = len(prompts)
    asked = [None, *fields.values()]
    answers = bench.answers(
        [*prompts] * len(asked),
        [field for field in asked for _ in prompts],
        AMPLIFIED_TOKENS,
        scored=False,
    )
    own = answers[:n]
    costs = kls(studies, texts(own), list(fields.values()))
    made: dict[str, Any] = {}
    for i, (name, kl) in enumerate(zip(["unsteered", *fields], [0.0, *costs], strict=True)):
        its = answers[i * n : (i + 1) * n]
        changed = [a.tokens != b.tokens for a, b in zip(its, own, strict=True)]
        made[name] = {
            "shown": on_topic(label, its),
            "kl": kl,
            "changed": mean(changed),
            "answers": [answer.text for answer in its],
        }
    return made


def main() -> None:
    """Measure every condition and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--sae", type=Path, default=SAE)
    parser.add_argument("--style", type=int, default=STYLE)
    args = parser.parse_args()
    labels = {label.index: label for label in read_labels(args.sae / "labels.jsonl")}
    bench = Bench(args.sae)
    studies = OfflineStudies(bench.engine.llm)
    kept = KeptRows(Path("build") / f"conditional-{args.sae.name}.json")
    conditions = {
        topic: kept.of(f"condition {topic}", condition, studies, topic)
        for topic in TOPICS
        if topic != OTHER
    }
    print(conditions, flush=True)
    label = labels[args.style]
    record = Record(
        name_of_result("conditional", args.sae),
        "A style on every answer and only where a topic has come up, on its prompts and on others.",
        {"sae": args.sae.name, "dtype": DTYPE, "tokens": AMPLIFIED_TOKENS, "strength": STRENGTH,
         "style": label.label, "prompts": len(second_half(TOPICS[OTHER])),
         "conditions": json.dumps(conditions)},
    )  # fmt: skip
    rows = {}
    for topic, fields in cases(args.style, conditions).items():
        for where in (topic, OTHER):
            prompts = second_half(TOPICS[where])
            rows[f"{topic}, prompts on {where}"] = of_both = kept.of(
                f"{args.style} {topic} {where}",
                measured,
                bench,
                studies,
                prompts,
                fields,
                label,
            )
            for name, row in of_both.items():
                figures = {figure: row[figure] for figure in ("shown", "kl", "changed")}
                record.add(topic=topic, prompts=where, style=name, **figures)
    bench.engine.shut_down()
    record.kept["rows"] = rows
    record.save(args.json)


if __name__ == "__main__":
    main()
