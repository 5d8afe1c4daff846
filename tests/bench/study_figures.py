"""What calibrate, rank and attribute find on the demo SAE, and with how much work.

``python -m tests.bench.study_figures [out.json] [--full] [--parts calibrate rank attribute]``

Calibrate. Every labelled feature (without ``--full`` every fifth), clamped to its maximum times a
multiplier, at a KL of 0.1 on two of the passages that ship with the project: the share of features
that are met, and how many multipliers were tried.

Rank. How well each figure tells the labelled features that work (``steering_effect.json``, on topic
at 1.5 times the maximum) from those that do not: area under the ROC curve. After the prompt of Arad
et al. with their edit and with the default one, and in mean over chat prompts with the default one.

Attribute. Greedy answers to chat prompts: how many of the four features whose ablation costs the
answer most ``groups`` finds, and with which share of the tokens of ``exact``. The whole answer, and
four tokens of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import mean
from typing import Any, Final

import numpy as np

from sae.discovery import auroc
from sae.features import FeatureTable
from sae.training.labels import read_labels
from steering.errors import BudgetNotMetError
from steering.studies.neutral import neutral_passages
from steering.vllm.offline_studies import OfflineStudies
from tests.bench.cases import D_SAE
from tests.bench.demo_engine import SAE, demo_engine
from tests.bench.record import RESULTS, Record, arguments, spread
from tests.bench.steering_effect import SELECTED_AT, works
from tests.bench.steering_prompts import REPORT, SELECTION
from tests.engine.engine import Engine

PARTS: Final = ("calibrate", "rank", "attribute")
NAME: Final = "l14"
BUDGET: Final = 0.1
ARAD: Final = {"op": "add", "value": 10, "unit": "token_max"}
ANSWERED_TOKENS: Final = 40
SPANS: Final = ((0, ANSWERED_TOKENS), (20, 24))
STRONGEST: Final = 4
CANDIDATES: Final = (64, 256)


def calibrate(studies: OfflineStudies, features: Sequence[int], record: Record) -> None:
    """Share of features whose budget is met, and the tries it took."""
    texts = [{"prompt": passage} for passage in neutral_passages()[:5:4]]
    tries: list[float] = []
    missed = []
    for feature in features:
        edit = {"feature": feature, "op": "clamp", "value": 1, "unit": "max_act"}
        body = {
            "steering": {"interventions": [edit]},
            "budget": {"value": BUDGET},
            "texts": texts,
        }
        try:
            answer = studies.run("calibrate", body)
        except BudgetNotMetError:
            missed.append(feature)
        else:
            tries.append(len(answer["curve"]))
            print(feature, answer["multiplier"], answer["achieved"], tries[-1], flush=True)
    within_5 = sum(count <= 5 for count in tries) / len(features)
    record.add(
        part="calibrate", what=f"KL {BUDGET}", features=len(features), missed=str(missed),
        tries=spread(tries), met_within_5_tries=within_5,
    )  # fmt: skip


def rank(studies: OfflineStudies, prompts: int, record: Record) -> None:
    """Area under the ROC curve of every figure, for features that work."""
    rows = json.loads((RESULTS / "steering_effect.json").read_text())["rows"]
    tried = {
        row["feature"]: works(row)
        for row in rows
        if row.get("prompts") == "selection" and row["strength"] == SELECTED_AT
    }
    features = sorted(tried)
    cases: list[tuple[str, list[dict[str, Any]]]] = [
        ("Arad et al.", [{"edit": ARAD, "at": "last"}]),
        ("their prompt, 1.5 x maximum", [{}]),
        (
            f"{prompts} chat prompts, 1.5 x maximum",
            [{"messages": [{"role": "user", "content": q}]} for q in SELECTION[:prompts]],
        ),
    ]
    for what, bodies in cases:
        answers = []
        for body in bodies:
            answer = studies.run("rank", {"features": features, **body}, NAME)
            answers.append({entry["feature"]: entry for entry in answer["features"]})
        for figure in ("kl", "output_score", "delta_confidence"):
            means = {f: mean(answer[f][figure] for answer in answers) for f in features}
            record.add(part="rank", what=what, figure=figure, **_told(means, tried))
    table = FeatureTable.open(SAE, D_SAE)
    density = {feature: table.get(feature).density or 0.0 for feature in features}
    record.add(part="rank", what="recorded", figure="density", **_told(density, tried))


def _told(figures: dict[int, float], works: dict[int, bool]) -> dict[str, float]:
    """How well a figure tells what works, and how much of its top fifth does."""
    first, second = (
        np.array([[figures[f]] for f in figures if works[f] == wanted], dtype=np.float32)
        for wanted in (True, False)
    )
    top = sorted(figures, key=lambda f: -figures[f])[: len(figures) // 5]
    return {
        "auroc": float(auroc(first, second)[0]),
        "works_of_top_fifth": mean(works[f] for f in top),
        "works_of_all": mean(works.values()),
    }


def attribute(engine: Engine, studies: OfflineStudies, texts: int, record: Record) -> None:
    """What groups find of what is found one by one."""
    for span in SPANS:
        found: dict[int, list[tuple[float, float]]] = {number: [] for number in CANDIDATES}
        for question in REPORT[:texts]:
            body = {**_answered(engine, question), "span": list(span)}
            for candidates, of_texts in found.items():
                asked = {**body, "candidates": candidates}
                exact, exact_runs = _attributed(studies, asked)
                groups, runs = _attributed(studies, {**asked, "search": "groups"})
                recall = len({*exact[:STRONGEST]} & {*groups}) / STRONGEST
                of_texts.append((recall, runs / exact_runs))
                print(question, span, candidates, recall, runs, exact_runs, flush=True)
        for candidates, of_texts in found.items():
            record.add(
                part="attribute", what=f"tokens {span[0]} to {span[1]}", candidates=candidates,
                texts=len(of_texts), recall=mean(recall for recall, _ in of_texts),
                tokens=mean(share for _, share in of_texts),
            )  # fmt: skip


def _answered(engine: Engine, question: str) -> dict[str, Any]:
    """A question and its greedy answer, in token ids."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=ANSWERED_TOKENS, temperature=0.0, repetition_penalty=1.1, ignore_eos=True
    )
    (output,) = engine.llm.chat([{"role": "user", "content": question}], params, use_tqdm=False)
    return {
        "prompt": list(output.prompt_token_ids),
        "completion": list(output.outputs[0].token_ids),
    }


def _attributed(studies: OfflineStudies, body: dict[str, Any]) -> tuple[list[int], int]:
    """Features by the size of their effect, and how many runs that took; all are equally long."""
    runs = 0

    def listen(done: int, of: int) -> None:
        nonlocal runs
        runs = done

    answer = studies.run("attribute", body, NAME, listen)
    return [entry["feature"] for entry in answer["features"]], runs


def main() -> None:
    """Run the parts and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    record = Record(
        "study_figures",
        "What calibrate, rank and attribute find on the demo SAE, and with how much work.",
        {"sae": SAE.name, "budget": BUDGET, "passages": 2, "answered_tokens": ANSWERED_TOKENS},
    )
    engine = demo_engine({NAME: SAE}, eager=True)
    studies = OfflineStudies(engine.llm)
    labelled = [label.index for label in read_labels(SAE / "labels.jsonl")]
    if "calibrate" in args.parts:
        calibrate(studies, labelled[:: 1 if args.full else 5], record)
    if "rank" in args.parts:
        rank(studies, 8 if args.full else 2, record)
    if "attribute" in args.parts:
        attribute(engine, studies, len(REPORT) if args.full else 3, record)
    engine.shut_down()
    record.save(args.json)


if __name__ == "__main__":
    main()
