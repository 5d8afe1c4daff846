"""SmolLM2 and its SAE over HTTP against transformers with hooks, both in float32."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from torch import Tensor

from tests.demo_sae import ELVES
from tests.engine.reference import ReferenceModel, ReferenceSAE, behind_best, margin

if TYPE_CHECKING:
    from tests.engine.server import LiveServer

pytest_plugins = ("tests.engine.server",)
pytestmark = pytest.mark.timeout(600)

TOLERANCE: Final = 1e-3
#: Specs that come nearer than this to a jump of the SAE are left out.
MARGIN: Final = 5e-4
NUM_SPECS: Final = 130
LEAST_SPECS: Final = 100
SPECS_SHOWN_TO_ACT: Final = 8
GENERATED: Final = 5

TEXTS: Final = (
    "The snow fell on the elves of the forest.",
    "def fibonacci(n):\n    return n if n < 2 else",
    "What is the capital of France?",
    "She was very sad, because her brother had",
)


class Reference:
    """The model and the SAEs, without any of this project's code."""

    def __init__(self, server: LiveServer) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(server.model)
        special = set(self.tokenizer.all_special_ids)
        special |= {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        self.special = special
        self.model = ReferenceModel(server.model, sorted(special))
        self.saes = {
            name: ReferenceSAE(folder, 2000.0 if name == "l14" else None)
            for name, folder in server.saes.items()
        }
        lines = (server.saes["l14"] / "features.jsonl").read_text().splitlines()
        rows = map(json.loads, lines)
        self.max_activation = {
            row["index"]: row["max_activation"] for row in rows if row.get("max_activation")
        }

    def activations(self, ids: list[int], sae: str) -> Tensor:
        """Unsteered activations `[len(ids), d_sae]`; the last token's are of no use."""
        seen: dict[str, Tensor] = {}
        self.model.logprobs(ids, [0], {sae: self.saes[sae]}, None, seen)
        return self.saes[sae].encode(seen[sae])

    def logprobs(
        self, prompt: list[int], generated: list[int], field: Mapping[str, Any] | None
    ) -> tuple[Tensor, float]:
        """Log-probabilities `[len(generated), vocab]`, and how near any activation that matters
        lies to its threshold."""
        used = {item["sae"] for item in (field or {}).get("interventions", [])}
        saes = {name: self.saes[name] for name in used}
        seen: dict[str, Tensor] = {}
        found = self.model.logprobs(prompt, generated, saes, field, seen)
        return found, margin(saes, seen, field, first=1)


@pytest.fixture(scope="module")
def reference(live_server: LiveServer) -> Reference:
    return Reference(live_server)


def specs(reference: Reference) -> Iterable[tuple[list[int], dict[str, Any]]]:
    """Prompts and fields: every operation, windows, phases and units, on features that fire there
    and on others; the same in every run."""
    rng = random.Random(14)
    prompts = [reference.tokenizer.encode(text) for text in TEXTS]
    active = [
        reference.activations(ids, "l14")[1:].amax(0).topk(40).indices.tolist() for ids in prompts
    ]
    ops = ("clamp", "ablate", "scale", "add", "floor", "cap")
    values = {
        "clamp": (0.0, 20.0, 60.0),
        "scale": (0.0, 0.5, 3.0, -1.0),
        "add": (-20.0, 15.0, 40.0),
        "floor": (10.0, 50.0),
        "cap": (0.0, 8.0),
    }
    places: tuple[dict[str, Any], ...] = (
        {},
        {"prompt": False},
        {"generation": False},
        {"start": 3, "end": 9},
        {"special_tokens": True},
        {"end": 5},
    )
    for i in range(NUM_SPECS):
        which = i % len(prompts)
        op = ops[i % len(ops)]
        items = []
        for feature in rng.sample(active[which], rng.randint(1, 4)):
            if rng.random() < 0.3:
                feature = rng.randrange(4608)
            item: dict[str, Any] = {"sae": "l14", "feature": feature, "op": op}
            if op != "ablate":
                item["value"] = rng.choice(values[op])
            recorded = feature in reference.max_activation
            if op in ("clamp", "add", "floor") and recorded and rng.random() < 0.4:
                item |= {"value": rng.choice([0.25, 0.5, 1.5]), "unit": "max_act"}
            if rng.random() < 0.4:
                item["positions"] = rng.choice(places[3:])
            items.append(item)
            op = rng.choice(ops)
        if i % 5 == 0:
            items.append({"sae": "second", "feature": i % 64, "op": "add", "value": 30.0})
        field: dict[str, Any] = {"interventions": unique(items)}
        if i % 2:
            field["positions"] = rng.choice(places)
        if i % 4 == 0:
            field["error_term"] = False
        yield prompts[which], field


def unique(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last edit of each feature."""
    return list({(item["sae"], item["feature"]): item for item in items}.values())


def in_raw_units(reference: Reference, field: dict[str, Any]) -> dict[str, Any]:
    """The same field with every `max_act` multiplied out."""

    def raw(item: dict[str, Any]) -> dict[str, Any]:
        if item.get("unit") != "max_act":
            return item
        return {**item, "value": item["value"] * reference.max_activation[item["feature"]]}

    return {**field, "interventions": [raw(item) for item in field["interventions"]]}


def difference(
    reference: Reference, prompt: list[int], choice: dict[str, Any], field: dict[str, Any] | None
) -> tuple[float, float]:
    """Largest difference of log-probabilities, and the margin; tokens must be the likeliest."""
    generated = choice["token_ids"]
    expected, near = reference.logprobs(prompt, generated, field)
    if near >= MARGIN:
        assert behind_best(expected, generated) < TOLERANCE, field
    own = torch.tensor(choice["logprobs"]["token_logprobs"])
    theirs = expected[range(len(generated)), generated]
    return float((own - theirs).abs().max()), near


def test_log_probabilities_agree_with_transformers_and_hooks(
    live_server: LiveServer, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    body = {"max_tokens": GENERATED, "ignore_eos": True}
    cases = [*specs(reference)]
    with ThreadPoolExecutor(8) as pool:
        choices = [*pool.map(lambda case: live_server.choice(*case, **body), cases)]
    plain = max(
        difference(reference, ids, live_server.choice(ids, **body), None)[0]
        for ids in map(reference.tokenizer.encode, TEXTS)
    )
    worst = effect = 0.0
    compared = 0
    for (prompt, field), choice in zip(cases, choices, strict=True):
        found, near = difference(reference, prompt, choice, in_raw_units(reference, field))
        if near < MARGIN:
            continue
        assert found < TOLERANCE, (found, near, field)
        worst = max(worst, found)
        compared += 1
        if compared <= SPECS_SHOWN_TO_ACT:
            effect = max(effect, effect_of(reference, prompt, choice))
    assert compared >= LEAST_SPECS
    assert effect > 1.0, "the edits of this test do nothing"
    with capsys.disabled():
        print(
            f"\n  SmolLM2 over HTTP against transformers: unsteered {plain:.1e}, steered "
            f"{worst:.1e} over {compared} specs (edits change them by up to {effect:.1f})"
        )


def effect_of(reference: Reference, prompt: list[int], choice: dict[str, Any]) -> float:
    """How far the choice's log-probabilities are from those of the same tokens unsteered."""
    expected, _ = reference.logprobs(prompt, choice["token_ids"], None)
    own = torch.tensor(choice["logprobs"]["token_logprobs"])
    theirs = expected[range(len(own)), choice["token_ids"]]
    return float((own - theirs).abs().max())


# Reads and inspection


def test_read_gives_the_activations_of_the_reference(
    live_server: LiveServer, reference: Reference
) -> None:
    prompt = reference.tokenizer.encode(TEXTS[0])
    found = live_server.complete(prompt, {"read": {"sae": "l14", "top_k": 8}}, max_tokens=1)
    f = reference.activations(prompt, "l14")
    tokens = found.json()["steering"]["read"]["tokens"]
    assert [token["position"] for token in tokens] == [*range(1, len(prompt))]
    for token in tokens:
        expected = f[token["position"]]
        assert token["text"] == reference.tokenizer.decode([token["id"]])
        for feature, value in token["features"]:
            assert value == pytest.approx(float(expected[feature]), abs=0.02)
        weakest = token["features"][-1][1]
        assert sum(expected > weakest + 0.02) < 8


def test_report_measures_the_activations_of_the_reference(
    live_server: LiveServer, reference: Reference
) -> None:
    prompt = reference.tokenizer.encode(TEXTS[0])
    f = reference.activations(prompt, "l14")[1:]
    feature = int(f.sum(0).argmax())
    edit = {"sae": "l14", "feature": feature, "op": "add", "value": 0.5}
    steering = {"interventions": [edit], "report": True}
    (entry,) = live_server.complete(prompt, steering, max_tokens=1).json()["steering"][
        "interventions"
    ]
    own = f[:, feature]
    assert entry["tokens_edited"] == len(prompt) - 1
    assert entry["tokens_active"] == int((own > 0).sum())
    assert entry["mean_activation"] == pytest.approx(float(own.mean()), rel=1e-3)
    assert entry["max_activation"] == pytest.approx(float(own.max()), rel=1e-3)


@pytest.mark.parametrize("aggregate", ["max", "mean", "frequency"])
@pytest.mark.parametrize("special_tokens", [False, True])
def test_inspection_scores_features_over_the_text(
    live_server: LiveServer, reference: Reference, aggregate: str, special_tokens: bool
) -> None:
    # `second` has no sink_norm: its first token takes part where special tokens are asked for.
    messages = [{"role": "user", "content": TEXTS[0]}]
    body = {
        "messages": messages,
        "aggregate": aggregate,
        "top_k": 4,
        "special_tokens": special_tokens,
    }
    found = live_server.client.post("/v1/saes/second/inspect", json=body).json()
    ids = reference.tokenizer.apply_chat_template(messages, return_dict=False)
    covered = [
        i for i, token in enumerate(ids) if special_tokens or (i and token not in reference.special)
    ]
    assert found["sae"] == "second"
    assert [token["position"] for token in found["tokens"]] == covered
    assert [token["id"] for token in found["tokens"]] == [ids[i] for i in covered]
    f = reference.activations(ids, "second")[covered]
    scores = {"max": f.amax(0), "mean": f.mean(0), "frequency": (f > 0).float().mean(0)}[aggregate]
    assert [entry["score"] for entry in found["features"]] == pytest.approx(
        scores.topk(4).values.tolist(), rel=1e-3
    )
    for entry in found["features"]:
        assert entry["score"] == pytest.approx(float(scores[entry["feature"]]), rel=1e-3)
        assert entry["label"] is None


def test_sink_is_neither_read_nor_edited_and_is_counted(live_server: LiveServer) -> None:
    # The first token's norm is above 20,000 here; l14 has sink_norm 2000, twin has none.
    positions = {"special_tokens": True, "generation": False}
    firsts, counts = [], []
    for sae in ("l14", "twin"):
        steering = {
            "interventions": [{"sae": sae, "feature": 5, "op": "cap", "value": 1e6}],
            "positions": positions,
            "read": {"sae": sae, "top_k": 1},
            "report": True,
        }
        found = live_server.complete(TEXTS[0], steering, max_tokens=1).json()["steering"]
        firsts.append(found["read"]["tokens"][0]["position"])
        (entry,) = found["interventions"]
        counts.append((entry["tokens_edited"], entry["tokens_skipped"]))
    assert firsts == [1, 0]
    (edited, skipped), (all_edited, none_skipped) = counts
    assert (edited, skipped, none_skipped) == (all_edited - 1, 1, 0)


def test_inspection_covers_sinks_where_special_tokens_are_asked_for(
    live_server: LiveServer,
) -> None:
    for asked, first in ((False, 1), (True, 0)):
        body = {"prompt": TEXTS[0], "special_tokens": asked, "top_k": 1}
        found = live_server.client.post("/v1/saes/l14/inspect", json=body).json()
        assert found["tokens"][0]["position"] == first


def test_inspection_names_labelled_features(live_server: LiveServer) -> None:
    body = {"prompt": "The elves and the dwarves fought the orcs.", "top_k": 20}
    features = live_server.client.post("/v1/saes/l14/inspect", json=body).json()["features"]
    labels = {entry["feature"]: entry["label"] for entry in features}
    assert labels[ELVES] == "elves and other fantasy peoples (orcs, dwarves, trolls)"
