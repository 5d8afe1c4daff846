"""What every feature of an SAE makes the model say, labelled or not, and on which topics one works.

``python -m tests.bench.every_feature [out.json] [--sae FOLDER] [--effects JSON ...] [--budget KL]``

A label says what a feature fires on, and few features say what they fire on. So each feature is
clamped to one activation, that which costs the labelled ones the budget in the median, and answers
the first `SCREENED` prompts of `SELECTION`. Every test of ``labels.jsonl`` is then held against all
of these answers. Features all of whose answers pass a test, `CANDIDATES` at most, are clamped as
strongly as costs the budget on the model's own unsteered answers, and answer all of `SELECTION`.
What works there, as in ``steering_effect``, is reported on `REPORT`, the best feature of each test
alone: nothing was chosen by those prompts. For a topic without such a feature the pair of those two
whose short answers come nearest to it, equally strong at first, is searched up to the budget and
treated likewise. The labelled features themselves are tried in ``equal_kl``.

Rows are kept in ``build/`` as they are made: begun again, this goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

from sae.training.labels import Label, read_labels
from steering.vllm.offline_studies import OfflineStudies
from tests.bench.chat_answers import repeated
from tests.bench.demo_engine import SAE, name_of_result
from tests.bench.doses import doses
from tests.bench.kept_rows import KeptRows
from tests.bench.record import Record, arguments
from tests.bench.steering_answers import DTYPE, Answer, Bench, Field
from tests.bench.steering_effect import AMPLIFIED_TOKENS, MOST_REPEATED, effect, works
from tests.bench.steering_prompts import REPORT, SELECTION
from tests.bench.suppression import texts

#: The median KL of the features that work (``equal_kl``).
BUDGET: Final = 1.3
#: Prompts whose unsteered answers the KL is of.
MEASURED: Final = 2
#: Labelled features whose doses say how strongly all are clamped at first.
SOUNDED: Final = 24
SCREENED: Final = 2
SCREENED_TOKENS: Final = 32
SCREENED_AT_ONCE: Final = 128
CANDIDATES: Final = 3
#: The kind of label that gets a pair.
PAIRED: Final = "topic"
#: Edits whose doses are searched, and which answer, in one go.
AT_ONCE: Final = 16

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sought:
    """Something that an answer may show.

    Attributes:
        label: one of those that share its test; which feature has it is of no account.
        features: those labelled so.
    """

    label: Label
    features: tuple[int, ...]

    def shown_in(self, text: str) -> bool:
        """Whether an answer shows it."""
        return self.label.matches(text) >= self.label.in_answer


def sought_by(labels: Iterable[Label]) -> list[Sought]:
    """What labels say, each test once."""
    of_test: dict[tuple[str, int], list[Label]] = defaultdict(list)
    for label in labels:
        of_test[label.test, label.in_answer].append(label)
    return [Sought(same[0], tuple(label.index for label in same)) for same in of_test.values()]


def clamps(activations: Mapping[int, float]) -> Field:
    """Clamp features to these activations."""
    return {
        "interventions": [
            {"feature": feature, "op": "clamp", "value": value}
            for feature, value in activations.items()
        ]
    }


def key_of(activations: Iterable[int]) -> str:
    """The name of a set of features."""
    return "+".join(map(str, sorted(activations)))


class Experiment:
    """One SAE's features at one KL.

    Args:
        bench: that answers.
        kept: rows that are there already, and get what is made.
        budget: mean KL of a token.
    """

    def __init__(self, bench: Bench, kept: KeptRows, budget: float) -> None:
        self._bench = bench
        self._studies = OfflineStudies(bench.engine.llm)
        self._kept = kept
        self._budget = budget
        self.unsteered: dict[tuple[str, ...], list[Answer]] = {
            prompts: bench.answers(prompts, [None] * len(prompts), AMPLIFIED_TOKENS)
            for prompts in (SELECTION, REPORT)
        }
        self._own = texts(self.unsteered[SELECTION][:MEASURED])

    def activation(self, labels: Sequence[Label]) -> float:
        """The median activation at which features cost the budget."""
        sounded = labels[:: max(1, len(labels) // SOUNDED)]
        found: list[float] = self._kept.of(
            "activation",
            lambda: [
                value
                for dose in self._doses([{label.index: 64.0} for label in sounded])
                if dose is not None
                for value in dose.values()
            ],
        )
        return median(found)

    def screen(self, activation: float) -> list[list[str]]:
        """The short answers of every feature, by its index."""
        made: list[list[str]] = []
        for start in range(0, self._bench.sae.card.d_sae, SCREENED_AT_ONCE):
            made += self._kept.of(f"screen {start}", self._screened, start, activation)
            print("screened", len(made), flush=True)
        return made

    def _screened(self, start: int, activation: float) -> list[list[str]]:
        features = range(start, min(start + SCREENED_AT_ONCE, self._bench.sae.card.d_sae))
        prompts = SELECTION[:SCREENED]
        fields = [clamps({feature: activation}) for feature in features for _ in prompts]
        answers = self._bench.answers(
            [*prompts] * len(features), fields, SCREENED_TOKENS, scored=False
        )
        said = [answer.text for answer in answers]
        return [said[i : i + SCREENED] for i in range(0, len(said), SCREENED)]

    def dosed(self, edits: Iterable[Mapping[int, float]]) -> dict[str, Row]:
        """Each edit's strength at the budget, and its answers to `SELECTION`, by `key_of`."""
        asked = {key_of(edit): edit for edit in edits}
        left = [key for key in asked if f"dosed {key}" not in self._kept]
        for start in range(0, len(left), AT_ONCE):
            batch = left[start : start + AT_ONCE]
            found = self._doses([asked[key] for key in batch])
            met = [dose for dose in found if dose is not None]
            answers = iter(self._answers(met, SELECTION))
            for key, dose in zip(batch, found, strict=True):
                row = {"dose": None} if dose is None else {"dose": dose, "answers": next(answers)}
                self._kept.put(f"dosed {key}", row)
            print("dosed", start + len(batch), "of", len(left), flush=True)
        return {key: self._kept[f"dosed {key}"] for key in asked}

    def reported(self, rows: Mapping[str, Row]) -> dict[str, Row]:
        """The answers of dosed edits to `REPORT`."""
        left = [key for key in rows if f"reported {key}" not in self._kept]
        for start in range(0, len(left), AT_ONCE):
            batch = left[start : start + AT_ONCE]
            answers = self._answers([_dose(rows[key]) for key in batch], REPORT)
            for key, its in zip(batch, answers, strict=True):
                self._kept.put(f"reported {key}", {"answers": its})
            print("reported", start + len(batch), "of", len(left), flush=True)
        return {key: self._kept[f"reported {key}"] for key in rows}

    def figures(self, sought: Sought, row: Row, prompts: Sequence[str]) -> dict[str, float]:
        """How far an edit's answers show something."""
        answers = [Answer(**answer) for answer in row["answers"]]
        return effect(sought.label, answers, self.unsteered[tuple(prompts)])

    def _doses(self, edits: Sequence[Mapping[int, float]]) -> list[dict[int, float] | None]:
        found = doses(
            self._studies, self._own, [clamps(edit) for edit in edits], [self._budget] * len(edits)
        )
        return [
            None
            if dose.steering is None
            else {edit["feature"]: edit["value"] for edit in dose.steering["interventions"]}
            for dose in found
        ]

    def _answers(
        self, edits: Sequence[Mapping[int, float]], prompts: Sequence[str]
    ) -> list[list[dict[str, Any]]]:
        fields = [clamps(edit) for edit in edits for _ in prompts]
        answers = self._bench.answers([*prompts] * len(edits), fields, AMPLIFIED_TOKENS)
        n = len(prompts)
        return [
            [asdict(replace(answer, prompt=[])) for answer in answers[i * n : (i + 1) * n]]
            for i in range(len(edits))
        ]


def _dose(row: Row) -> dict[int, float]:
    return {int(feature): value for feature, value in row["dose"].items()}


def shown_most(sought: Sought, screened: Sequence[Sequence[str]], most: int) -> list[int]:
    """The features whose short answers show something, the most often and least repetitive first.

    A labelled feature comes before others that do as well.
    """
    found = []
    for feature, answers in enumerate(screened):
        shown = sum(map(sought.shown_in, answers))
        if shown:
            matches = sum(map(sought.label.matches, answers))
            broken = mean(map(repeated, answers)) > MOST_REPEATED
            order = (broken, -shown, feature not in sought.features, -matches)
            found.append((order, feature))
    return [feature for _, feature in sorted(found)[:most]]


def best_of(
    experiment: Experiment, sought: Sought, edits: Iterable[str], rows: Mapping[str, Row]
) -> tuple[str | None, int]:
    """The edit that works best on `SELECTION`, None if none does; and how many work."""
    working = []
    for key in edits:
        if rows[key]["dose"] is not None:
            figures = experiment.figures(sought, rows[key], SELECTION)
            if works(figures):
                working.append((-figures["on_topic"], figures["perplexity_ratio"], key))
    return (min(working)[2] if working else None), len(working)


def experimented(experiment: Experiment, labels: Sequence[Label]) -> list[dict[str, Any]]:
    """A row for each of the tests: what was tried, and what works and holds."""
    activation = experiment.activation(labels)
    screened = experiment.screen(activation)
    all_sought = sought_by(labels)
    nearest = [shown_most(sought, screened, CANDIDATES) for sought in all_sought]
    tried = [
        [str(feature) for feature in features if all(map(sought.shown_in, screened[feature]))]
        for sought, features in zip(all_sought, nearest, strict=True)
    ]
    singles = dict.fromkeys(key for keys in tried for key in keys)
    rows = experiment.dosed({int(key): activation} for key in singles)
    found = [
        best_of(experiment, sought, keys, rows)
        for sought, keys in zip(all_sought, tried, strict=True)
    ]
    pairs = {
        i: {feature: activation / 2 for feature in features[:2]}
        for i, features in enumerate(nearest)
        if found[i][0] is None and len(features) > 1 and all_sought[i].label.kind == PAIRED
    }
    rows |= experiment.dosed(pairs.values())
    for i, pair in pairs.items():
        tried[i].append(key_of(pair))
        found[i] = best_of(experiment, all_sought[i], [key_of(pair)], rows)
    reported = experiment.reported({key: rows[key] for key, _ in found if key is not None})
    made = []
    for sought, keys, (best, working) in zip(all_sought, tried, found, strict=True):
        row: dict[str, Any] = {
            "kind": sought.label.kind,
            "label": sought.label.label,
            "labelled": [*sought.features],
            "say_it_when_screened": sum(all(map(sought.shown_in, said)) for said in screened),
            "tried": keys,
            "work": working,
            "edit": None,
        }
        if best is not None:
            row |= {
                "edit": rows[best]["dose"],
                "selection": experiment.figures(sought, rows[best], SELECTION),
                "report": experiment.figures(sought, reported[best], REPORT),
                "answers": [answer["text"] for answer in reported[best]["answers"]],
            }
        made.append(row)
    return made


def labelled_with_it(row: Row) -> bool:
    """Whether the edit is of one feature, and that is labelled with what it shows."""
    features = [*map(int, row["edit"])]
    return len(features) == 1 and features[0] in row["labelled"]


def main() -> None:
    """Run the experiment and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--sae", type=Path, default=SAE, help="a folder with labels.jsonl")
    parser.add_argument("--budget", type=float, default=BUDGET)
    args = parser.parse_args()
    name = name_of_result("every_feature", args.sae)
    record = Record(
        name,
        "What makes the model say something, of all features of an SAE, at one KL.",
        {"sae": args.sae.name, "dtype": DTYPE, "budget": args.budget},
    )
    bench = Bench(args.sae)
    experiment = Experiment(bench, KeptRows(Path("build") / f"{name}.json"), args.budget)
    rows = experimented(experiment, read_labels(args.sae / "labels.jsonl"))
    bench.engine.shut_down()
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        with_edit = [row for row in of_kind if row["edit"] is not None]
        holding = [row for row in with_edit if works(row["report"])]
        record.add(
            kind=kind, tests=len(of_kind), work=len(with_edit), also_on_report=len(holding),
            by_a_labelled_feature=sum(map(labelled_with_it, holding)),
            by_a_pair=sum(len(row["edit"]) > 1 for row in holding),
            labelled_features_of_these=sum(len(row["labelled"]) for row in holding),
        )  # fmt: skip
    record.kept["rows"] = rows
    record.save(args.json)


if __name__ == "__main__":
    main()
