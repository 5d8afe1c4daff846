"""A style put on every answer, and only where a topic has come up: effect kept, cost saved.

``python -m tests.bench.conditional [out.json] [--sae FOLDER] [--styles FEATURE ...]``

A style is a feature clamped to its maximum on generated tokens: those two of the demo's README that
do most at that strength, and are on none of the topics. A topic's condition is found by
``contrast`` on the first half of its prompts against the first half of all others, at the
largest activation in each: the first feature by AUROC, above the midpoint of its two means.
It is tried with scope ``so_far`` and with scope ``prompt``.

Reported on the second halves, apart for prompts of the topic and all others: the share of answers
(40 tokens, as in ``steering_effect``) in which the style's label shows, by the label's own test;
KL of the edit on the unsteered answers, over their tokens; and the share of answers that are not
the unsteered ones, token by token. Rows are kept in ``build/`` as they are made: begun again, this
goes on.
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
from tests.bench.demo_engine import SAE
from tests.bench.doses import kls
from tests.bench.kept_rows import KeptRows
from tests.bench.record import RESULTS, Record, arguments
from tests.bench.steering_answers import DTYPE, SAE_NAME, Answer, Bench, cost
from tests.bench.steering_effect import AMPLIFIED_TOKENS, on_topic
from tests.bench.suppression import texts

STYLES: Final = (4308, 2417)
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


def cases(styles: Sequence[int], conditions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every style without a condition and under each topic's."""
    found: list[dict[str, Any]] = []
    for style in styles:
        found.append({"style": style, "topic": None, "scope": None, "field": styled(style, None)})
        for topic, one in conditions.items():
            for scope in SCOPES:
                when = {"feature": one["feature"], "above": one["above"], "scope": scope}
                field = styled(style, when)
                found.append({"style": style, "topic": topic, "scope": scope, "field": field})
    return found


def measured(
    bench: Bench,
    studies: OfflineStudies,
    case: Mapping[str, Any],
    unsteered: Mapping[str, Sequence[Answer]],
    label: Label,
) -> dict[str, Any]:
    """A case's figures on each topic's second half."""
    made = {}
    for topic, own in unsteered.items():
        prompts = second_half(TOPICS[topic])
        answers = bench.answers(prompts, [case["field"]] * len(prompts), AMPLIFIED_TOKENS)
        (kl,) = kls(studies, texts(own), [case["field"]])
        changed = [a.tokens != b.tokens for a, b in zip(answers, own, strict=True)]
        made[topic] = {
            "shown": on_topic(label, answers),
            "shown_unsteered": on_topic(label, own),
            "kl": kl,
            "perplexity_ratio": cost(answers, own),
            "changed": mean(changed),
            "answers": [answer.text for answer in answers],
        }
    return made


def summary(by_topic: Mapping[str, Mapping[str, Any]], topics: Sequence[str]) -> dict[str, float]:
    """Means over topics of as many prompts each."""
    names = ("shown", "shown_unsteered", "kl", "perplexity_ratio", "changed")
    return {name: mean(by_topic[topic][name] for topic in topics) for name in names}


def main() -> None:
    """Measure every style and condition and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--sae", type=Path, default=SAE)
    parser.add_argument("--styles", type=int, nargs="+", default=STYLES)
    args = parser.parse_args()
    labels = {label.index: label for label in read_labels(args.sae / "labels.jsonl")}
    bench = Bench(args.sae)
    studies = OfflineStudies(bench.engine.llm)
    kept = KeptRows(Path("build") / f"conditional-{args.sae.name}.json")
    named = [topic for topic in TOPICS if topic != OTHER]
    conditions = {
        topic: kept.of(f"condition {topic}", lambda topic=topic: condition(studies, topic))
        for topic in named
    }
    print(conditions, flush=True)
    record = Record(
        "conditional",
        "A style on every answer and only where a topic has come up, on its prompts and on others.",
        {"sae": args.sae.name, "dtype": DTYPE, "tokens": AMPLIFIED_TOKENS, "strength": STRENGTH,
         "prompts": len(second_half(TOPICS[OTHER])), "conditions": json.dumps(conditions)},
    )  # fmt: skip
    unsteered = {}
    for topic, prompts in TOPICS.items():
        asked = second_half(prompts)
        unsteered[topic] = bench.answers(asked, [None] * len(asked), AMPLIFIED_TOKENS)
    rows = []
    for case in cases(args.styles, conditions):
        key = f"{case['style']} {case['topic']} {case['scope']}"
        label = labels[case["style"]]
        of_case = kept.of(
            key, lambda case=case, label=label: measured(bench, studies, case, unsteered, label)
        )
        rows.append({**case, "by_topic": of_case})
        for topic in named if case["topic"] is None else [case["topic"]]:
            others = [name for name in TOPICS if name != topic]
            for where, names in ((topic, [topic]), (f"not {topic}", others)):
                record.add(
                    style=label.label, condition=case["scope"] or "always", prompts=where,
                    **summary(of_case, names),
                )  # fmt: skip
    bench.engine.shut_down()
    path = args.json or RESULTS / "conditional.json"
    record.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
