"""What calibrate, rank and attribute find on the demo SAE, and with how much work.

``python -m tests.bench.study_figures [out.json] [--full] [--parts calibrate rank attribute]``
``[--sae FOLDER] [--effects JSON] [--write]``

What is found of each feature is kept in ``build/`` as it is made: begun again, this goes on. Parts
that are not asked for stay as the last run left them.

Calibrate. Every labelled feature (without ``--full`` every fifth), clamped to its maximum times a
multiplier, at a KL of 0.1 on two of the passages that ship with the project: the share of features
that are met, and how many multipliers were tried.

Rank. How well each figure tells the labelled features that work (``steering_effect.json``, on topic
at 1.5 times the maximum) from those that do not: area under the ROC curve. After the prompt of Arad
et al. with their edit and with the default one, and in mean over chat prompts with the default one.
Intervals are those of 2,000 bootstrap samples. With ``--write``, that mean KL goes into the SAE's
``features.jsonl`` as ``kl``, for the features that were ranked.

Attribute. Greedy answers to chat prompts: how many of the four features whose ablation costs the
answer most ``groups`` finds, and with which share of the tokens of ``exact``. The whole answer, and
four tokens of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

import numpy as np

from sae.discovery import auroc
from sae.features import FeatureTable
from sae.files import FEATURES_NAME
from sae.sae import open_sae
from sae.source import SAEReference
from sae.training.labels import read_labels
from steering.errors import BudgetNotMetError
from steering.studies.neutral import neutral_passages
from steering.vllm.offline_studies import OfflineStudies
from tests.bench.demo_engine import SAE, demo_engine, name_of_result
from tests.bench.kept_rows import KeptRows
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
BOOTSTRAP: Final = 2000


def calibrate(
    studies: OfflineStudies, features: Sequence[int], record: Record, rows: KeptRows
) -> None:
    """Share of features whose budget is met, and the tries it took."""
    texts = [{"prompt": passage} for passage in neutral_passages()[:5:4]]

    def calibrated(feature: int) -> dict[str, Any]:
        edit = {"feature": feature, "op": "clamp", "value": 1, "unit": "max_act"}
        body = {
            "steering": {"interventions": [edit]},
            "budget": {"value": BUDGET},
            "texts": texts,
        }
        try:
            answer = studies.run("calibrate", body)
        except BudgetNotMetError as error:
            return {"multiplier": None, "curve": error.curve}
        return {name: answer[name] for name in ("multiplier", "achieved", "curve")}

    found = {}
    for feature in features:
        one = rows.of(f"calibrate {feature}", calibrated, feature)
        found[feature] = one
        print(feature, one["multiplier"], len(one["curve"]), flush=True)
    met = {f: len(one["curve"]) for f, one in found.items() if one["multiplier"] is not None}
    record.add(
        part="calibrate", what=f"KL {BUDGET}", features=len(features),
        missed=str(sorted({*features} - {*met})), tries=spread([*map(float, met.values())]),
        met_within_5_tries=sum(count <= 5 for count in met.values()) / len(features),
    )  # fmt: skip


def rank(
    studies: OfflineStudies, prompts: int, record: Record, rows: KeptRows, sae: Path, effects: Path
) -> dict[int, float]:
    """Area under the ROC curve of every figure, for features that work.

    Returns:
        Mean KL over the chat prompts, by feature.
    """
    effect_rows = json.loads(effects.read_text())["rows"]
    tried = {
        row["feature"]: works(row)
        for row in effect_rows
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
    kl: dict[int, float] = {}
    for what, bodies in cases:
        answers = []
        for body in bodies:
            asked = {"features": features, **body}
            key = f"rank {json.dumps(body)}"
            answer = rows.of(key, studies.run, "rank", asked, NAME)
            answers.append({entry["feature"]: entry for entry in answer["features"]})
        for figure in ("kl", "output_score", "delta_confidence"):
            means = {f: mean(answer[f][figure] for answer in answers) for f in features}
            record.add(part="rank", what=what, figure=figure, **_told(means, tried))
            kl = means if figure == "kl" else kl
    table = FeatureTable.open(sae, open_sae(SAEReference(NAME, str(sae))).card.d_sae)
    density = {feature: table.get(feature).density or 0.0 for feature in features}
    record.add(part="rank", what="recorded", figure="density", **_told(density, tried))
    return kl


def write_kl(path: Path, kl: Mapping[int, float]) -> None:
    """Put a mean KL into each of these features' lines of a `features.jsonl`."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        feature = json.loads(line)
        if feature["index"] in kl:
            feature["kl"] = float(f"{kl[feature['index']]:.4g}")
            line = json.dumps(feature, ensure_ascii=False)
        lines.append(line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _told(figures: dict[int, float], works: dict[int, bool]) -> dict[str, Any]:
    """How well a figure tells what works, and how much of its top fifth does."""
    first, second = (
        np.array([[figures[f]] for f in figures if works[f] == wanted], dtype=np.float32)
        for wanted in (True, False)
    )
    top = sorted(figures, key=lambda f: -figures[f])[: len(figures) // 5]
    draw = np.random.default_rng(0)
    again = [
        float(auroc(draw.choice(first, len(first)), draw.choice(second, len(second)))[0])
        for _ in range(BOOTSTRAP)
    ]
    low, high = np.quantile(again, (0.025, 0.975))
    return {
        "auroc": float(auroc(first, second)[0]),
        "interval": f"{low:.2f} to {high:.2f}",
        "works_of_top_fifth": mean(works[f] for f in top),
        "works_of_all": mean(works.values()),
    }


def attribute(
    engine: Engine, studies: OfflineStudies, texts: int, record: Record, rows: KeptRows
) -> None:
    """What groups find of what is found one by one."""
    for span in SPANS:
        found: dict[int, list[tuple[float, float]]] = {number: [] for number in CANDIDATES}
        for question in REPORT[:texts]:
            body = {**_answered(engine, question), "span": list(span)}
            for candidates, of_texts in found.items():
                asked = {**body, "candidates": candidates}
                key = f"attribute {question} {span} {candidates}"
                exact = rows.of(f"{key} exact", _attributed, studies, asked)
                asked["search"] = "groups"
                groups = rows.of(f"{key} groups", _attributed, studies, asked)
                of_four = {feature for feature, _ in exact["effects"][:STRONGEST]}
                recall = len(of_four & {feature for feature, _ in groups["effects"]}) / STRONGEST
                of_texts.append((recall, groups["runs"] / exact["runs"]))
                print(question, span, candidates, recall, groups["runs"], exact["runs"], flush=True)
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


def _attributed(studies: OfflineStudies, body: dict[str, Any]) -> dict[str, Any]:
    """Features and effects, by the size of the effect, and how many runs of one length it took."""
    runs = 0

    def listen(done: int, of: int) -> None:
        nonlocal runs
        runs = done

    answer = studies.run("attribute", body, NAME, listen)
    effects = [[entry["feature"], entry["effect"]] for entry in answer["features"]]
    return {"effects": effects, "runs": runs}


def main() -> None:
    """Run the parts and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sae", type=Path, default=SAE, help="a folder with labels.jsonl")
    parser.add_argument("--effects", type=Path, default=RESULTS / "steering_effect.json")
    parser.add_argument("--write", action="store_true", help="KL into the SAE's features.jsonl")
    args = parser.parse_args()
    record = Record(
        name_of_result("study_figures", args.sae),
        "What calibrate, rank and attribute find on the demo SAE, and with how much work.",
        {"sae": args.sae.name, "budget": BUDGET, "passages": 2, "answered_tokens": ANSWERED_TOKENS},
    )
    path = args.json or RESULTS / f"{record.name}.json"
    before = json.loads(path.read_text())["results"] if path.exists() else []
    record.results += [row for row in before if row["part"] not in args.parts]
    rows = KeptRows(Path("build") / f"study_figures-{args.sae.name}.json")
    engine = demo_engine({NAME: args.sae}, eager=True)
    studies = OfflineStudies(engine.llm)
    labelled = [label.index for label in read_labels(args.sae / "labels.jsonl")]
    if "rank" in args.parts:
        kl = rank(studies, 8 if args.full else 2, record, rows, args.sae, args.effects)
        if args.write:
            write_kl(args.sae / FEATURES_NAME, kl)
    if "calibrate" in args.parts:
        calibrate(studies, labelled[:: 1 if args.full else 5], record, rows)
    if "attribute" in args.parts:
        attribute(engine, studies, len(REPORT) if args.full else 3, record, rows)
    engine.shut_down()
    record.save(path)


if __name__ == "__main__":
    main()
