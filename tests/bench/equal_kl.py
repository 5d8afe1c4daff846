"""How many labelled features work at equal KL, against equal multiples of their maximum.

``python -m tests.bench.equal_kl [out.json] [--sae FOLDER] [--effects JSON] [--every N]``

KL is that of a clamp on the model's own unsteered answers to the first two prompts of `SELECTION`,
40 tokens each, over the answers' tokens. The budget is the median KL of the features that work in
``steering_effect`` at the strength at which they do (1.5 or 2 times the maximum). Each labelled
feature (or every Nth) is then clamped as strongly as costs that, answers the first four prompts,
and is judged as there ("works"). For comparison the answers that ``steering_effect`` kept of the
same features to the same prompts at 1.5 times the maximum are judged likewise, but for their cost,
which it has for all of its prompts together. What works at equal KL is reported on the first
`REPORTED` prompts of `REPORT`. Rows are kept in ``build/`` as they are made: begun again, this goes
on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

from sae.training.labels import Label, read_labels
from steering.vllm.offline_studies import OfflineStudies
from tests.bench.demo_engine import SAE
from tests.bench.doses import doses, kls
from tests.bench.kept_rows import KeptRows
from tests.bench.record import RESULTS, Record, arguments, spread
from tests.bench.steering_answers import DTYPE, Answer, Bench
from tests.bench.steering_effect import (
    AMPLIFIED_TOKENS,
    SELECTED_AT,
    amplified,
    effect,
    works,
)
from tests.bench.steering_prompts import REPORT, SELECTION
from tests.bench.suppression import texts

PROMPTS: Final = 4
#: Of these, those whose answers KL is of.
MEASURED: Final = 2
REPORTED: Final = 6
#: Features whose answers are made in one batch.
AT_ONCE: Final = 16

Row = Mapping[str, Any]


def tried_before(effects: Path) -> list[dict[str, Any]]:
    """What ``steering_effect`` found of each feature on the prompts of `SELECTION`."""
    rows = json.loads(effects.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row.get("prompts") == "selection"]


def at_equal_maximum(row: Row, label: Label, unsteered: Sequence[Answer]) -> bool:
    """Whether a feature worked at a multiple of its maximum, on the prompts of this experiment."""
    shown = [label.matches(text) >= label.in_answer for text in row["answers"][:PROMPTS]]
    before = [label.matches(answer.text) >= label.in_answer for answer in unsteered]
    figures = {**row, "on_topic": mean(shown), "on_topic_unsteered": mean(before)}
    return works(figures)


def answered(
    bench: Bench,
    prompts: Sequence[str],
    unsteered: Sequence[Answer],
    steered: Sequence[tuple[Label, Mapping[str, Any]]],
) -> dict[int, dict[str, Any]]:
    """The figures of each feature with its edit, and its answers."""
    fields = [field for _, field in steered for _ in prompts]
    answers = bench.answers([*prompts] * len(steered), fields, AMPLIFIED_TOKENS)
    made: dict[int, dict[str, Any]] = {}
    for i, (label, _) in enumerate(steered):
        its = answers[i * len(prompts) : (i + 1) * len(prompts)]
        made[label.index] = {
            **effect(label, its, unsteered),
            "answers": [answer.text for answer in its],
        }
    return made


def batches(labels: Sequence[Label]) -> list[Sequence[Label]]:
    """So many labels at once."""
    return [labels[start : start + AT_ONCE] for start in range(0, len(labels), AT_ONCE)]


def main() -> None:
    """Find the budget and each feature's dose, judge the answers and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--sae", type=Path, default=SAE)
    parser.add_argument("--effects", type=Path, default=RESULTS / "steering_effect.json")
    parser.add_argument("--every", type=int, default=1, help="of so many labelled features one")
    args = parser.parse_args()
    every = read_labels(args.sae / "labels.jsonl")
    labels = {label.index: label for label in every[:: args.every]}
    before = tried_before(args.effects)
    working = {row["feature"]: row["strength"] for row in before if works(row)}
    bench = Bench(args.sae)
    studies = OfflineStudies(bench.engine.llm)
    kept = KeptRows(Path("build") / f"equal_kl-{args.sae.name}-{args.every}.json")
    prompts = SELECTION[:PROMPTS]
    unsteered = bench.answers(prompts, [None] * len(prompts), AMPLIFIED_TOKENS)
    own = texts(unsteered[:MEASURED])

    def at_their_strength() -> dict[str, float]:
        found = kls(studies, own, [amplified(f, strength) for f, strength in working.items()])
        return {str(feature): kl for feature, kl in zip(working, found, strict=True)}

    costs = kept.of("working", at_their_strength)
    budget = median(costs.values())
    print("budget", budget, sorted(costs.values()), flush=True)

    def batch_of(batch: Sequence[Label]) -> dict[str, Any]:
        asked = [amplified(label.index, SELECTED_AT) for label in batch]
        found = doses(studies, own, asked, [budget] * len(batch))
        steered = [
            (label, dose.steering)
            for label, dose in zip(batch, found, strict=True)
            if dose.steering is not None
        ]
        figures = answered(bench, prompts, unsteered, steered)
        return {
            str(label.index): {**asdict(dose), **figures.get(label.index, {})}
            for label, dose in zip(batch, found, strict=True)
        }

    rows: dict[str, dict[str, Any]] = {}
    for batch in batches([*labels.values()]):
        rows |= kept.of(f"batch {batch[0].index}", batch_of, batch)
        print(len(rows), "of", len(labels), flush=True)
    met = {int(f): row for f, row in rows.items() if row["steering"] is not None}
    works_now = [labels[f] for f, row in met.items() if works(row)]
    at_maximum = {
        row["feature"]
        for row in before
        if row["strength"] == SELECTED_AT
        and row["feature"] in labels
        and at_equal_maximum(row, labels[row["feature"]], unsteered)
    }

    def report() -> dict[str, Any]:
        asked = REPORT[:REPORTED]
        plain = bench.answers(asked, [None] * len(asked), AMPLIFIED_TOKENS)
        steered = [(label, met[label.index]["steering"]) for label in works_now]
        return {str(f): row for f, row in answered(bench, asked, plain, steered).items()}

    reported = kept.of("report", report)
    bench.engine.shut_down()
    multiples = [row["steering"]["interventions"][0]["value"] for row in met.values()]
    record = Record(
        "equal_kl",
        "Labelled features that work at equal KL and at equal multiples of their maximum.",
        {"sae": args.sae.name, "dtype": DTYPE, "prompts": PROMPTS, "tokens": AMPLIFIED_TOKENS,
         "budget": budget, "working_before": len(working)},
    )  # fmt: skip
    record.add(
        what="all", tried=len(labels), met=len(met), works_at_equal_kl=len(works_now),
        works_at_equal_maximum=len(at_maximum),
        both=len({label.index for label in works_now} & at_maximum),
        works_on_report=sum(works(row) for row in reported.values()),
        tries=spread([float(row["tries"]) for row in rows.values()]),
        times_maximum=spread(multiples),
    )  # fmt: skip
    for kind in sorted({label.kind for label in labels.values()}):
        of_kind = {index for index, label in labels.items() if label.kind == kind}
        record.add(
            what=kind, tried=len(of_kind), met=len(of_kind & {*met}),
            works_at_equal_kl=sum(label.kind == kind for label in works_now),
            works_at_equal_maximum=len(at_maximum & of_kind),
            works_on_report=sum(works(reported[str(i)]) for i in of_kind if str(i) in reported),
        )  # fmt: skip
    record.save(args.json)
    path = args.json or RESULTS / "equal_kl.json"
    written = json.loads(path.read_text()) | {"rows": rows, "reported": reported, "working": costs}
    path.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
