"""What calibrate, rank and attribute say on a real engine, against transformers with hooks."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steering.errors import BudgetNotMetError, SteeringError
from steering.request.catalog import Catalog
from steering.studies.neutral import neutral_texts
from steering.studies.progress import Progress
from steering.studies.registry import STUDIES
from steering.studies.study import Context
from steering.unembedding import open_unembedding
from steering.vllm.door import catalog_for
from steering.vllm.reader import OfflineReader
from steering.vllm.vocabulary import OfflineVocabulary
from tests.engine.engine import SPECIAL_TOKEN_IDS, Engine, start
from tests.engine.outputs import tokens
from tests.engine.reference import ReferenceModel, ReferenceSAE
from tests.models import D_MODEL, NUM_LAYERS, VOCAB_SIZE, make_tiny_model, make_tiny_sae

#: In nats; transformers and vLLM round differently.
TOLERANCE = 3e-5
LABELLED = (3, 5, 9, 17, 40)
FEATURES: list[dict[str, Any]] = [
    *({"index": i, "label": f"feature {i}", "max_activation": 4.0 + i / 10} for i in LABELLED),
    {"index": 20, "label": "no maximum"},
    {"index": 30, "max_activation": 2.0},
]
PROMPT, COMPLETION = tokens(1, 24), tokens(2, 13)[1:]


#: Features of SAE c that write a thousand times as much as its others.
PLANTED = (11, 42, 77, 101)


class Studied:
    """An engine, and the reference of its model."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.config = engine.llm.llm_engine.vllm_config
        self.model = ReferenceModel(engine.model, SPECIAL_TOKEN_IDS)
        self.saes = {name: ReferenceSAE(path) for name, path in engine.saes.items()}
        self.progress = Progress()

    @property
    def catalog(self) -> Catalog:
        return catalog_for(self.config)

    def context(self, **settings: Any) -> Context:
        tokenizer = self.engine.llm.get_tokenizer()
        self.progress = Progress()
        return Context(
            self.catalog,
            OfflineReader(self.engine.llm),
            OfflineVocabulary(self.engine.llm),
            progress=self.progress,
            unembedding=functools.partial(open_unembedding, self.config.model_config, tokenizer),
            **settings,
        )

    def rank(self, body: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
        return asyncio.run(STUDIES["rank"].run(self.context(**settings), body, "a"))

    def attribute(self, body: Mapping[str, Any], sae: str = "a") -> dict[str, Any]:
        return asyncio.run(STUDIES["attribute"].run(self.context(), body, sae))

    def calibrate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return asyncio.run(STUDIES["calibrate"].run(self.context(), body))

    def log_probs(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        field: Mapping[str, Any] | None,
        seen: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """``[n, vocabulary]`` log p of what predicts each token of the completion."""
        return self.model.logprobs(prompt, completion, self.saes, field, seen).double()

    def after_last(self, prompt: Sequence[int], field: Mapping[str, Any] | None) -> Tensor:
        """``[vocabulary]`` log p of what follows a prompt."""
        return self.log_probs(prompt, [0], field)[0]

    def activations(self, ids: Sequence[int], sae: str = "a") -> Tensor:
        """``[n, d_sae]`` of covered tokens; zero of the others."""
        seen: dict[str, Tensor] = {}
        self.log_probs(ids, [0], None, seen)
        covered = [i > 0 and one not in SPECIAL_TOKEN_IDS for i, one in enumerate(ids)]
        return self.saes[sae].encode(seen[sae]) * torch.tensor(covered)[:, None]


def plant(folder: Path) -> None:
    """Let all features but the planted ones write next to nothing, though they fire as before."""
    file = folder / "sae_weights.safetensors"
    tensors = load_file(file)
    others = torch.ones(len(tensors["W_dec"]), dtype=torch.bool)
    others[list(PLANTED)] = False
    tensors["W_dec"][others] *= 1e-3
    save_file(tensors, file)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studied]:
    folder = tmp_path_factory.mktemp("studies")
    model = make_tiny_model(folder / "llama", "llama")
    saes = {
        "a": make_tiny_sae(folder / "a", architecture="standard", features=FEATURES),
        "b": make_tiny_sae(folder / "b", architecture="topk", layer=2, seed=1),
        "c": make_tiny_sae(folder / "c", architecture="standard", layer=2, seed=2),
    }
    plant(saes["c"])
    engine = start(
        model,
        saes,
        d_model=D_MODEL,
        num_layers=NUM_LAYERS,
        special_token_ids=SPECIAL_TOKEN_IDS,
    )
    yield Studied(engine)
    engine.shut_down()


@pytest.fixture(autouse=True)
def nothing_is_left(studied: Studied) -> Iterator[None]:
    yield
    assert len(studied.engine.state.captures) == 0


def ranked(studied: Studied, ids: Sequence[int], field: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one edited feature, as the contract words them."""
    (edit, *_) = field["interventions"]
    before, after = studied.after_last(ids, None), studied.after_last(ids, field)
    with torch.inference_mode():
        model = studied.model.model
        W_dec = studied.saes["a"].weights["W_dec"][edit["feature"]]
        promoted = model.lm_head(model.model.norm(W_dec)).topk(20).indices
    rank = min(int((after > after[one]).sum()) for one in promoted)
    return {
        "kl": float((before.exp() * (before - after)).sum()),
        "output_score": (1 - rank / VOCAB_SIZE) * float(after[promoted].max().exp()),
        "delta_confidence": float(after.max() - before.max()),
    }


def agrees(found: Mapping[str, Any], expected: Mapping[str, float]) -> None:
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=TOLERANCE)


def test_rank_by_default_clamps_every_labelled_feature_after_the_default_prompt(
    studied: Studied,
) -> None:
    answer = studied.rank({})
    ids = studied.engine.llm.get_tokenizer().encode("From my experience,")
    assert answer["prompt_token_ids"] == ids
    assert sorted(entry["feature"] for entry in answer["features"]) == list(LABELLED)
    for entry in answer["features"]:
        value = 1.5 * (4.0 + entry["feature"] / 10)
        field = {
            "interventions": [
                {"sae": "a", "feature": entry["feature"], "op": "clamp", "value": value}
            ]
        }
        agrees(entry, ranked(studied, ids, field))
        assert entry["label"] == f"feature {entry['feature']}" and entry["targets"] == {}
    assert [entry["kl"] for entry in answer["features"]] == sorted(
        (entry["kl"] for entry in answer["features"]), reverse=True
    )
    assert (studied.progress.done, studied.progress.of) == (len(LABELLED), len(LABELLED))


@pytest.mark.parametrize("at", ["last", "all"])
def test_rank_adds_times_the_largest_activation_at_each_token(studied: Studied, at: str) -> None:
    edit: dict[str, Any] = {"op": "add", "value": 10 if at == "last" else 0.5, "unit": "token_max"}
    answer = studied.rank(
        {"features": [7, 50], "prompt": PROMPT, "edit": edit, "at": at, "by": "output_score"}
    )
    largest = studied.activations(PROMPT).amax(1)
    where = [len(PROMPT) - 1] if at == "last" else range(1, len(PROMPT))
    for entry in answer["features"]:
        edits = [
            {
                "sae": "a",
                "feature": entry["feature"],
                "op": "add",
                "value": edit["value"] * float(largest[position]),
                "positions": {"start": position, "end": position + 1},
            }
            for position in where
        ]
        agrees(entry, ranked(studied, PROMPT, {"interventions": edits}))
    scores = [entry["output_score"] for entry in answer["features"]]
    assert scores == sorted(scores, reverse=True)


def test_rank_says_how_the_first_tokens_of_targets_change(studied: Studied) -> None:
    tokenizer = studied.engine.llm.get_tokenizer()
    answer = studied.rank(
        {
            "features": [5, 3, 5],
            "prompt": PROMPT,
            "edit": {"op": "ablate"},
            "by": "change",
            "targets": [" the", "When I"],
        }
    )
    assert [entry["feature"] for entry in answer["features"]] in ([3, 5], [5, 3])
    before = studied.after_last(PROMPT, None)
    for entry in answer["features"]:
        field = {"interventions": [{"sae": "a", "feature": entry["feature"], "op": "ablate"}]}
        change = studied.after_last(PROMPT, field) - before
        expected = {
            text: float(change[tokenizer.encode(text, add_special_tokens=False)[0]])
            for text in (" the", "When I")
        }
        assert entry["targets"] == pytest.approx(expected, abs=TOLERANCE)
    changes = [entry["targets"][" the"] for entry in answer["features"]]
    assert changes == sorted(changes, reverse=True)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [5, 9, 2], "at": "last"}, "at"),
        ({"prompt": [5], "at": "last"}, "at"),
        ({"prompt": [5, 2, 1]}, "prompt"),
        ({"prompt": [5], "edit": {"op": "add", "value": 1, "unit": "token_max"}}, "prompt"),
        (
            {"prompt": tokens(3, 66), "edit": {"op": "add", "value": 1, "unit": "token_max"}},
            "edit.unit",
        ),
    ],
    ids=["special", "first", "all special", "alone", "too many values"],
)
def test_rank_refuses_an_edit_that_covers_nothing_or_has_too_many_values(
    studied: Studied, body: Mapping[str, Any], param: str
) -> None:
    with pytest.raises(SteeringError) as refused:
        studied.rank({"features": [3], **body})
    assert (refused.value.code, refused.value.param) == ("invalid_value", param)
    assert studied.progress.of == 0


def ablated(
    studied: Studied, feature: int, span: tuple[int, int], match: str = "delta", sae: str = "a"
) -> float:
    """log P(span) less log P(span) with a feature switched off, by transformers."""
    field = {
        "interventions": [{"sae": sae, "feature": feature, "op": "ablate"}],
        "match": match,
    }
    found = []
    for one in (None, field):
        log_p = studied.log_probs(PROMPT, COMPLETION, one)
        found.append(sum(float(log_p[i, COMPLETION[i]]) for i in range(*span)))
    return found[0] - found[1]


@pytest.mark.parametrize("mode", ["ablate", "reread"])
def test_attribution_is_what_each_of_the_strongest_writers_is_worth(
    studied: Studied, mode: str
) -> None:
    span = (4, 9)
    answer = studied.attribute(
        {
            "prompt": PROMPT,
            "completion": COMPLETION,
            "span": list(span),
            "candidates": 6,
            "mode": mode,
        }
    )
    log_p = studied.log_probs(PROMPT, COMPLETION, None)
    whole = sum(float(log_p[i, COMPLETION[i]]) for i in range(*span))
    assert answer["log_probability"] == pytest.approx(whole, abs=5 * TOLERANCE)
    f = studied.activations([*PROMPT, *COMPLETION[: span[1] - 1]])
    written = f.sum(0) * studied.saes["a"].weights["W_dec"].norm(dim=1)
    found = {entry["feature"]: entry for entry in answer["features"]}
    if mode == "reread":  # of which few can be solved in an SAE of random weights
        weights = studied.saes["a"].weights
        written *= (weights["W_enc"].T * weights["W_dec"]).sum(1) >= 0.2
    firing = int((written > 0).sum())
    assert sorted(found) == sorted(written.topk(min(firing, 6)).indices.tolist())
    match = "reread" if mode == "reread" else "delta"
    for feature, entry in found.items():
        effect = ablated(studied, feature, span, match)
        assert entry["effect"] == pytest.approx(effect, abs=5 * TOLERANCE)
        assert entry["activation"] == pytest.approx(float(f[:, feature].max()), abs=1e-4)
    sizes = [abs(entry["effect"]) for entry in answer["features"]]
    assert sizes == sorted(sizes, reverse=True)


def test_attribution_of_a_topk_sae_takes_listed_candidates(studied: Studied) -> None:
    f = studied.activations([*PROMPT, *COMPLETION[:-1]], "b")
    firing = f.amax(0).argsort(descending=True)[:2].tolist()
    silent = int((f.amax(0) == 0).nonzero()[0])
    answer = studied.attribute(
        {"prompt": PROMPT, "completion": COMPLETION, "candidates": [*firing, silent, firing[0]]},
        "b",
    )
    found = {entry["feature"]: entry["effect"] for entry in answer["features"]}
    assert found.keys() == {*firing, silent}
    assert found[silent] == 0.0
    for feature in firing:
        effect = ablated(studied, feature, (0, len(COMPLETION)), sae="b")
        assert found[feature] == pytest.approx(effect, abs=len(COMPLETION) * TOLERANCE)


def test_groups_find_planted_causes_with_fewer_runs(studied: Studied) -> None:
    body = {"prompt": PROMPT, "completion": COMPLETION, "candidates": 128}
    exact = studied.attribute(body, "c")
    runs = studied.progress.done
    groups = studied.attribute({**body, "search": "groups"}, "c")
    assert studied.progress.done < runs / 2
    effects = {entry["feature"]: entry["effect"] for entry in exact["features"]}
    found = {entry["feature"]: entry["effect"] for entry in groups["features"]}
    assert found == pytest.approx({one: effects[one] for one in found}, abs=1e-3)
    strongest = [entry["feature"] for entry in exact["features"][:4]]
    assert set(strongest) == set(PLANTED) <= found.keys()


def test_text_without_a_covered_token_is_attributed_to_nothing(studied: Studied) -> None:
    answer = studied.attribute({"prompt": [5], "completion": [7], "candidates": [3, 5]})
    assert answer["features"] == []
    log_p = studied.log_probs([5], [7], None)
    assert answer["log_probability"] == pytest.approx(float(log_p[0, 7]), abs=TOLERANCE)


TEXTS = [
    {"prompt": PROMPT, "completion": COMPLETION},
    {"prompt": tokens(4, 17)},
    {"prompt": tokens(5, 9)},
]
EDIT = {
    "interventions": [
        {"sae": "a", "feature": 3, "op": "clamp", "value": 1, "unit": "max_act"},
        {"sae": "a", "feature": 9, "op": "scale", "value": 3},
        {"sae": "b", "feature": 4, "op": "ablate"},
    ],
    "report": True,
}


def costs(studied: Studied, steering: Mapping[str, Any]) -> dict[str, float]:
    """kl, nll and the mean share of an edit on the texts, by transformers."""
    kl, rise, shares = [], [], []
    interventions = [
        {**item, "value": item["value"] * 4.3, "unit": "raw"} if item.get("unit") else item
        for item in steering["interventions"]
    ]
    for text in TEXTS:
        if "completion" in text:
            prompt, scored = text["prompt"], text["completion"]
        else:
            prompt, scored = text["prompt"][:1], text["prompt"][1:]
        before = studied.log_probs(prompt, scored, None)
        after, made = studied.model.trace(
            prompt, scored, studied.saes, {"interventions": interventions}
        )
        after = after.double()
        kl.append((before.exp() * (before - after)).sum(-1))
        rise.append((before - after).gather(1, torch.tensor(scored)[:, None])[:, 0])
        shares += [share[~share.isnan()] for share, _ in made.shares.values()]
    return {
        "kl": float(torch.cat(kl).mean()),
        "nll": float(torch.cat(rise).mean()),
        "mean_share": float(torch.cat(shares).double().mean()),
    }


@pytest.mark.parametrize(
    "budget", [{"value": 0.8}, {"metric": "nll", "value": 0.05}], ids=["kl", "nll"]
)
def test_calibrated_edit_costs_what_it_may_and_every_try_is_told(
    studied: Studied, budget: dict[str, Any]
) -> None:
    answer = studied.calibrate({"steering": EDIT, "budget": budget, "texts": TEXTS})
    metric, value = budget.get("metric", "kl"), budget.get("value", 0.1)
    assert 0.9 * value <= answer["achieved"] <= value
    m = answer["multiplier"]
    clamp, scale, ablate = answer["steering"]["interventions"]
    assert clamp == {**EDIT["interventions"][0], "value": m}  # type: ignore[index]
    assert scale["value"] == pytest.approx(1 + 2 * m)
    assert ablate == EDIT["interventions"][2]  # type: ignore[index]
    tried = [point["multiplier"] for point in answer["curve"]]
    assert tried == sorted(set(tried)) and m in tried
    for point in answer["curve"]:
        steering = {
            "interventions": [
                {**clamp, "value": point["multiplier"]},
                {**scale, "value": 1 + 2 * point["multiplier"]},
                ablate,
            ]
        }
        expected = costs(studied, steering)
        assert point["mean_share"] == pytest.approx(expected.pop("mean_share"), rel=1e-4)
        for name, figure in expected.items():
            assert point[name] == pytest.approx(figure, abs=TOLERANCE)
        if point["multiplier"] == m:
            assert answer["achieved"] == point[metric]


def test_budget_that_no_multiplier_meets_is_refused_with_the_curve(studied: Studied) -> None:
    steering = {"interventions": [{"sae": "a", "feature": 3, "op": "clamp", "value": 0}]}
    with pytest.raises(BudgetNotMetError) as refused:
        studied.calibrate({"steering": steering, "texts": TEXTS, "budget": {"value": 3}})
    (point,) = refused.value.details["curve"]
    assert (refused.value.code, refused.value.param) == ("budget_not_met", "budget")
    expected = costs(studied, steering)
    assert point["multiplier"] == 1.0
    assert point["kl"] == pytest.approx(expected["kl"], abs=TOLERANCE)


def test_neutral_text_fits_a_short_context(studied: Studied) -> None:
    texts = asyncio.run(neutral_texts(studied.context()))
    lengths = np.array([len(text.prompt) for text in texts])
    assert len(texts) == 13
    assert (lengths <= studied.config.model_config.max_model_len).all() and (lengths > 50).all()


def test_study_of_more_tokens_than_the_server_allows_runs_nothing(studied: Studied) -> None:
    with pytest.raises(SteeringError) as refused:
        studied.rank({"features": [3, 5], "prompt": PROMPT}, max_tokens=4 * len(PROMPT) - 1)
    assert (refused.value.code, refused.value.param) == ("study_too_large", "features")
    assert studied.progress.of == 0
