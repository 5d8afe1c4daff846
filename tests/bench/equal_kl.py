"""How many labelled features work at equal KL, against equal multiples of their maximum.

``python -m tests.bench.equal_kl [out.json] [--sae FOLDER] [--effects JSON] [--every N]``
``[--kinds KIND ...]``

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

from sae.training.labels import Label, read_labels
from steering.vllm.offline_studies import OfflineStudies
from tests.bench.demo_engine import SAE, name_of_result
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


def missing(kept: KeptRows, name: str, labels: Sequence[Label]) -> Iterator[Sequence[Label]]:
    """Those of which there is no row of that name yet, so many at once."""
    left = [label for label in labels if f"{name} {label.index}" not in kept]
    return (left[start : start + AT_ONCE] for start in range(0, len(left), AT_ONCE))


class Experiment:
    """One SAE's features at one KL.

    Args:
        bench: that answers.
        kept: rows that are there already, and get what is made.
        working: features that worked, and at which multiple of their maximum.
    """

    def __init__(self, bench: Bench, kept: KeptRows, working: Mapping[int, float]) -> None:
        self._bench = bench
        self._studies = OfflineStudies(bench.engine.llm)
        self._kept = kept
        self.unsteered = self._plain(SELECTION[:PROMPTS])
        self._own = texts(self.unsteered[:MEASURED])
        self.costs: dict[str, float] = kept.of("working", self._at_their_strength, working)
        self.budget = median(self.costs.values())

    def tried(self, labels: Sequence[Label]) -> dict[int, dict[str, Any]]:
        """Each feature's dose, figures and answers."""
        for batch in missing(self._kept, "feature", labels):
            asked = [amplified(label.index, SELECTED_AT) for label in batch]
            found = doses(self._studies, self._own, asked, [self.budget] * len(batch))
            steered = [
                (label, dose.steering)
                for label, dose in zip(batch, found, strict=True)
                if dose.steering is not None
            ]
            figures = answered(self._bench, SELECTION[:PROMPTS], self.unsteered, steered)
            for label, dose in zip(batch, found, strict=True):
                row = {**asdict(dose), **figures.get(label.index, {})}
                self._kept.put(f"feature {label.index}", row)
            print(batch[-1].index, flush=True)
        return self._rows("feature", labels)

    def reported(
        self, labels: Sequence[Label], rows: Mapping[int, Row]
    ) -> dict[int, dict[str, Any]]:
        """Figures and answers on the other prompts."""
        plain = self._plain(REPORT[:REPORTED])
        for batch in missing(self._kept, "report", labels):
            steered = [(label, rows[label.index]["steering"]) for label in batch]
            for index, row in answered(self._bench, REPORT[:REPORTED], plain, steered).items():
                self._kept.put(f"report {index}", row)
        return self._rows("report", labels)

    def _plain(self, prompts: Sequence[str]) -> list[Answer]:
        return self._bench.answers(prompts, [None] * len(prompts), AMPLIFIED_TOKENS)

    def _at_their_strength(self, working: Mapping[int, float]) -> dict[str, float]:
        edits = [amplified(feature, strength) for feature, strength in working.items()]
        found = kls(self._studies, self._own, edits)
        return {str(feature): kl for feature, kl in zip(working, found, strict=True)}

    def _rows(self, name: str, labels: Sequence[Label]) -> dict[int, dict[str, Any]]:
        return {label.index: self._kept[f"{name} {label.index}"] for label in labels}


def figures_of(
    labels: Sequence[Label],
    rows: Mapping[int, Row],
    reported: Mapping[int, Row],
    at_maximum: set[int],
) -> dict[str, Any]:
    """How many of these features work, and how."""
    own = {label.index for label in labels}
    met = {index for index in own if rows[index]["steering"] is not None}
    works_now = {index for index in met if works(rows[index])}
    multiples = [rows[index]["steering"]["interventions"][0]["value"] for index in sorted(met)]
    return {
        "tried": len(own),
        "met": len(met),
        "met_within_5_tries": sum(rows[index]["tries"] <= 5 for index in met),
        "works_at_equal_kl": len(works_now),
        "works_at_equal_maximum": len(own & at_maximum),
        "both": len(works_now & at_maximum),
        "works_on_report": sum(works(reported[index]) for index in works_now),
        "times_maximum": spread(multiples) if multiples else None,
    }


def main() -> None:
    """Find the budget and each feature's dose, judge the answers and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--sae", type=Path, default=SAE)
    parser.add_argument("--effects", type=Path, default=RESULTS / "steering_effect.json")
    parser.add_argument("--every", type=int, default=1, help="of so many labelled features one")
    parser.add_argument("--kinds", nargs="+", default=(), help="all features of these kinds")
    args = parser.parse_args()
    every = read_labels(args.sae / "labels.jsonl")
    sample = every[:: args.every]
    labels = [one for one in every if one in sample or one.kind in args.kinds]
    before = tried_before(args.effects)
    bench = Bench(args.sae)
    kept = KeptRows(Path("build") / f"equal_kl-{args.sae.name}.json")
    experiment = Experiment(
        bench, kept, {row["feature"]: row["strength"] for row in before if works(row)}
    )
    print("budget", experiment.budget, sorted(experiment.costs.values()), flush=True)
    rows = experiment.tried(labels)
    works_now = [one for one in labels if rows[one.index]["steering"] and works(rows[one.index])]
    reported = experiment.reported(works_now, rows)
    bench.engine.shut_down()
    by_index = {label.index: label for label in labels}
    at_maximum = {
        row["feature"]
        for row in before
        if row["strength"] == SELECTED_AT
        and (label := by_index.get(row["feature"])) is not None
        and at_equal_maximum(row, label, experiment.unsteered)
    }
    record = Record(
        name_of_result("equal_kl", args.sae),
        "Labelled features that work at equal KL and at equal multiples of their maximum.",
        {"sae": args.sae.name, "dtype": DTYPE, "prompts": PROMPTS, "tokens": AMPLIFIED_TOKENS,
         "reported_on": REPORTED, "budget": experiment.budget,
         "working_before": len(experiment.costs)},
    )  # fmt: skip
    groups = {"all" if args.every == 1 else f"one of {args.every}": sample} | {
        kind: [one for one in labels if one.kind == kind]
        for kind in sorted({one.kind for one in labels})
    }
    for what, group in groups.items():
        record.add(what=what, **figures_of(group, rows, reported, at_maximum))
    record.kept |= {"rows": rows, "reported": reported, "working": experiment.costs}
    record.save(args.json)


if __name__ == "__main__":
    main()
