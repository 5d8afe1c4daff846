"""What features that steer move beside themselves, against random directions of equal norm.

``python -m tests.bench.side_effects [out.json] [--sae FOLDER] [--features I ...]``
``[--downstream FOLDER]``

Each feature is clamped to 1.5 times its maximum, and unit vectors drawn from the sphere (seed 0,
three to a feature, served as a dictionary of directions at the same hook point) are added as
strongly. Decoder rows have norm 1, so that both change the stream by as much, but for what the
feature has already. ``evaluate`` on passages that ship with the project says: KL, how many other
features of the SAE a token fires anew and how many fall silent, and how much of the change of the
stream the change of the SAE's features accounts for (`explained`); the same at a later SAE if one
is given. Rows are kept in ``build/`` as they are made: begun again, this goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

import torch
from safetensors.torch import save_file

from sae.features import FeatureTable
from sae.sae import open_sae
from sae.source import SAEReference
from tests.bench.demo_engine import SAE, name_of_result, settings
from tests.bench.kept_rows import KeptRows
from tests.bench.record import RESULTS, Record, arguments
from tests.bench.steering_answers import KV_CACHE, SAE_NAME
from tests.bench.steering_effect import SELECTED_AT

RANDOM: Final = "random"
DOWNSTREAM: Final = "downstream"
DRAWN: Final = 3
#: Of the project's passages, those that edits are tried on.
PASSAGES: Final = slice(0, 12, 6)
FIGURES: Final = ("kl", "share", "newly_active", "silenced", "explained")


def picked(effects: Path) -> list[int]:
    """The features that ``steering_effect`` reported."""
    rows = json.loads(effects.read_text(encoding="utf-8"))["rows"]
    return list(dict.fromkeys(row["feature"] for row in rows if row.get("prompts") == "report"))


def random_directions(folder: Path, number: int, d_in: int) -> Path:
    """A file of unit vectors: ``[number, d_in]`` float32."""
    drawn = torch.randn(number, d_in, generator=torch.Generator().manual_seed(0))
    path = folder / "random_directions.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"direction": drawn / drawn.norm(dim=1, keepdim=True)}, path)
    return path


def configurations(place: int, feature: int, norm: float) -> list[dict[str, Any]]:
    """A feature, and random directions as strongly."""
    clamp = {"sae": SAE_NAME, "feature": feature, "op": "clamp", "value": norm}
    edits = [("feature", clamp)]
    for i in range(DRAWN):
        drawn = {"sae": RANDOM, "feature": place * DRAWN + i, "op": "add", "value": norm}
        edits.append((f"{RANDOM} {i}", drawn))
    return [{"name": name, "steering": {"interventions": [edit]}} for name, edit in edits]


def begun(passage: str) -> dict[str, str]:
    """A passage whose first words are the prompt: without completion it would be answered."""
    words = passage.split(" ")
    return {"prompt": " ".join(words[:8]), "completion": " " + " ".join(words[8:])}


def figures(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of one configuration of an evaluation."""
    made: dict[str, Any] = {
        "kl": configuration["kl"]["mean"],
        "nll_rise": configuration["nll"]["steered"] - configuration["nll"]["unsteered"],
        "share": configuration["share"]["mean"],
    }
    for read in configuration["features"]:
        told = {name: read[name] for name in ("newly_active", "silenced", "explained", "leak")}
        told["moved"] = read["moved"][:3]
        made[read["sae"]] = told
    return made


def told_of(rows: Mapping[str, Any], sae: str, drawn: bool) -> list[dict[str, float]]:
    """The figures at an SAE of the features, or of the means of what was drawn for each."""
    found = []
    for of_feature in rows.values():
        names = [name for name in of_feature if name.startswith(RANDOM) is drawn]
        each = [{**of_feature[name], **of_feature[name][sae]} for name in names]
        found.append({figure: mean(one[figure] for one in each) for figure in FIGURES})
    return found


def main() -> None:
    """Evaluate every feature and write the JSON."""
    from server.commands.demo_model import ensure_demo_model
    from steering.studies.neutral import neutral_passages
    from steering.vllm.offline import SteeringLLM

    parser = arguments(__doc__)
    parser.add_argument("--sae", type=Path, default=SAE)
    parser.add_argument("--downstream", type=Path, help="an SAE of a later layer")
    parser.add_argument("--features", type=int, nargs="+")
    args = parser.parse_args()
    features = args.features or picked(RESULTS / "steering_effect.json")
    card = open_sae(SAEReference(SAE_NAME, str(args.sae))).card
    table = FeatureTable.open(args.sae, card.d_sae)
    drawn = random_directions(Path("build"), DRAWN * len(features), card.d_in)
    sources = [
        f"{SAE_NAME}={args.sae}",
        f"{RANDOM}={drawn},hook={card.hook},sink_norm={card.sink_norm:g}",
    ]
    if args.downstream is not None:
        sources.append(f"{DOWNSTREAM}={args.downstream}")
    options = settings(eager=True) | {"kv_cache_memory_bytes": KV_CACHE}
    llm = SteeringLLM(str(ensure_demo_model()), sources, **options)
    saes = [SAE_NAME, *([DOWNSTREAM] if args.downstream is not None else [])]
    texts = [begun(passage) for passage in neutral_passages()[PASSAGES]]
    kept = KeptRows(Path("build") / f"side_effects-{args.sae.name}-{len(saes)}.json")

    def evaluated(place: int, feature: int) -> dict[str, Any]:
        maximum = table.max_activation(feature)
        assert maximum is not None
        body = {
            "texts": texts,
            "configurations": configurations(place, feature, SELECTED_AT * maximum),
            "features": [{"sae": sae} for sae in saes],
        }
        answer = llm.evaluate(body)
        return {one["name"]: figures(one) for one in answer["configurations"]}

    rows = {}
    for i, feature in enumerate(features):
        rows[str(feature)] = kept.of(str(feature), evaluated, i, feature)
        print(feature, table.label(feature), json.dumps(rows[str(feature)]), flush=True)
    record = Record(
        name_of_result("side_effects", args.sae),
        "What features that steer move beside themselves, against random directions of equal norm.",
        {"sae": args.sae.name, "features": len(features), "drawn_a_feature": DRAWN,
         "times_maximum": SELECTED_AT, "passages": len(texts),
         "downstream": args.downstream and args.downstream.name},
    )  # fmt: skip
    for sae in saes:
        own, random = told_of(rows, sae, drawn=False), told_of(rows, sae, drawn=True)
        for figure in FIGURES:
            pairs = [(a[figure], b[figure]) for a, b in zip(own, random, strict=True)]
            record.add(
                read_at=sae, figure=figure, feature=median(a for a, _ in pairs),
                random=median(b for _, b in pairs),
                features_with_more=sum(a > b for a, b in pairs),
            )  # fmt: skip
    record.kept["rows"] = rows
    record.save(args.json)


if __name__ == "__main__":
    main()
