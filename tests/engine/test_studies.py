"""Studies on a real engine, against transformers and arithmetic in numpy.

`SteeringLLM` has them as methods; a server runs the same functions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import steering
from steering.errors import SteeringError
from tests.engine.engine import SPECIAL_TOKEN_IDS
from tests.engine.offline_arguments import ARGUMENTS
from tests.engine.reference import ReferenceModel, ReferenceSAE
from tests.models import make_tiny_sae

D_SAE: Final = 48
#: Recorded of two features; the others' densities are those of the given texts.
FEATURES: Final = [
    {"index": 3, "label": "three", "density": 0.9, "max_activation": 4.0},
    {"index": 5, "label": "five", "density": 0.001},
]
Ids = list[int]


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saes") / "a"
    return make_tiny_sae(folder, d_sae=D_SAE, architecture="standard", features=FEATURES)


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path], sae: Path) -> Iterator[Any]:
    made = steering.SteeringLLM(
        str(tiny_model("llama")), saes=[f"a={sae}"], max_study_tokens=400_000, **ARGUMENTS
    )
    yield made
    made.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def reference(tiny_model: Callable[[str], Path]) -> ReferenceModel:
    return ReferenceModel(tiny_model("llama"), SPECIAL_TOKEN_IDS)


def text(seed: int, tokens: range, prompt: int = 6, completion: int = 7) -> dict[str, Ids]:
    rng = random.Random(seed)
    ids = [rng.choice(tokens) for _ in range(prompt - 1 + completion)]
    return {"prompt": [1, *ids[: prompt - 1]], "completion": ids[prompt - 1 :]}


POSITIVE: Final = [text(i, range(4, 60), completion=5 + i) for i in range(5)]
#: A special token in the middle takes no part.
POSITIVE[0]["completion"][2] = 2
NEGATIVE: Final = [text(10 + i, range(60, 300), completion=4 + i) for i in range(4)]


def activations(
    reference: ReferenceModel, sae: Path, given: Mapping[str, Ids], over: str
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`[tokens, d_sae]` of the tokens that take part."""
    seen: dict[str, Any] = {}
    saes = {"a": ReferenceSAE(sae)}
    # The last token enters the model as well.
    reference.trace(given["prompt"], [*given["completion"], 0], saes, None, seen)
    f = saes["a"].encode(seen["a"]).double().numpy()
    ids = [*given["prompt"], *given["completion"]]
    start = len(given["prompt"]) if over == "completion" else 0
    end = len(given["prompt"]) if over == "prompt" else len(ids)
    kept = [i for i in range(start, end) if i > 0 and ids[i] not in SPECIAL_TOKEN_IDS]
    found: np.ndarray[Any, np.dtype[np.float64]] = f[kept]
    return found


POOLS: Final = {
    "mean": lambda f: f.mean(axis=0),
    "max": lambda f: f.max(axis=0),
    "last": lambda f: f[-1],
}


@pytest.mark.parametrize(
    ("over", "pool"), [("completion", "mean"), ("completion", "last"), ("all", "max")]
)
def test_contrast_is_what_numpy_makes_of_transformers_activations(
    llm: Any, reference: ReferenceModel, sae: Path, over: str, pool: str
) -> None:
    body = {"positive": POSITIVE, "negative": NEGATIVE, "pool": pool, "top_k": D_SAE}
    if over != "completion":  # which is what is left out
        body["over"] = over
    answer = llm.contrast("a", body)
    read = [
        [activations(reference, sae, one, over) for one in side] for side in (POSITIVE, NEGATIVE)
    ]
    first, second = (np.stack([POOLS[pool](f) for f in side]) for side in read)
    larger = first[:, None] > second[None] + 1e-6
    equal = np.abs(first[:, None] - second[None]) <= 1e-6
    auroc = (larger + equal / 2).mean(axis=(0, 1))
    spread = np.sqrt((first.var(axis=0, ddof=1) + second.var(axis=0, ddof=1)) / 2)
    difference = first.mean(axis=0) - second.mean(axis=0)
    for name, side, wanted in (("positive", 0, auroc > 0.5), ("negative", 1, auroc < 0.5)):
        found = {one["feature"]: one for one in answer[name]}
        assert {*found} == {*np.flatnonzero(wanted).tolist()}
        for feature, one in found.items():
            assert one["score"] == one["auroc"] == pytest.approx(auroc[feature])
            assert one["difference"] == pytest.approx(difference[feature], abs=1e-4)
            assert one["d"] == pytest.approx(difference[feature] / spread[feature], rel=1e-3)
            assert one["mean_positive"] == pytest.approx(first.mean(axis=0)[feature], abs=1e-4)
            assert one["mean_negative"] == pytest.approx(second.mean(axis=0)[feature], abs=1e-4)
            fires = np.concatenate(read[side])[:, feature]
            value = fires[fires > 0].mean() if (fires > 0).any() else None
            assert one["suggested_value"] == pytest.approx(value, abs=1e-4)
            assert one["label"] == {3: "three", 5: "five"}.get(feature)
        scores = [one["score"] for one in answer[name]]
        assert scores == sorted(scores, reverse=name == "positive")


def test_score_is_the_figure_that_was_asked_for(llm: Any) -> None:
    body = {"positive": POSITIVE, "negative": NEGATIVE, "top_k": 4}
    for by in ("difference", "d"):
        answer = llm.contrast("a", {**body, "by": by})
        for name, sign in (("positive", 1), ("negative", -1)):
            scores = [sign * one["score"] for one in answer[name]]
            assert scores == [sign * one[by] for one in answer[name]]
            assert scores == sorted(scores, reverse=True) and scores[-1] > 0
            assert len(scores) <= 4


def test_d_of_sides_of_one_text_is_null_and_ranks_nothing(llm: Any) -> None:
    body = {"positive": POSITIVE[:1], "negative": NEGATIVE[:1]}
    answer = llm.contrast("a", body)
    assert answer["positive"] and all(one["d"] is None for one in answer["positive"])
    assert llm.contrast("a", {**body, "by": "d"}) == {"positive": [], "negative": []}


def test_density_is_the_recorded_one_or_that_of_the_given_texts(
    llm: Any, reference: ReferenceModel, sae: Path
) -> None:
    body = {"positive": POSITIVE, "negative": NEGATIVE, "top_k": D_SAE, "by": "difference"}
    read = [activations(reference, sae, one, "completion") for one in (*POSITIVE, *NEGATIVE)]
    density = (np.concatenate(read) > 0).mean(axis=0)
    density[3], density[5] = 0.9, 0.001
    everything = {one["feature"] for side in llm.contrast("a", body).values() for one in side}
    answer = llm.contrast("a", {**body, "density": [0.3, 0.6]})
    found = {one["feature"] for side in answer.values() for one in side}
    within = np.flatnonzero((density >= 0.3) & (density <= 0.6)).tolist()
    assert found == everything & {*within}
    assert found < everything


def test_text_of_whose_tokens_none_takes_part_is_refused(llm: Any) -> None:
    body = {"positive": POSITIVE, "negative": [*NEGATIVE, {"prompt": [1, 5], "completion": [2]}]}
    with pytest.raises(ValueError, match="no token of this text takes part") as refused:
        llm.contrast("a", body)
    assert isinstance(refused.value, SteeringError)
    assert (refused.value.code, refused.value.param) == ("invalid_value", "negative[4]")


# Suggest


WANTED: Final = [text(20 + i, range(100, 103)) for i in range(6)]
UNWANTED: Final = [text(30 + i, range(200, 203)) for i in range(6)]
NEUTRAL: Final = [{"prompt": text(40 + i, range(4, 300), prompt=20)["prompt"]} for i in range(3)]


def log_odds(
    reference: ReferenceModel,
    sae: Path,
    sides: Sequence[Sequence[Mapping[str, Ids]]],
    field: Mapping[str, Any] | None,
) -> float:
    """Mean log P of the first side's completions less that of the second's, a token."""
    means = [
        np.mean([_log_probabilities(reference, sae, one, field).mean() for one in side])
        for side in sides
    ]
    return float(means[0] - means[1])


def _log_probabilities(
    reference: ReferenceModel, sae: Path, given: Mapping[str, Ids], field: Mapping[str, Any] | None
) -> np.ndarray[Any, np.dtype[np.float64]]:
    completion = given["completion"]
    saes = {"a": ReferenceSAE(sae)}
    logprobs = reference.logprobs(given["prompt"], completion, saes, field).double().numpy()
    found: np.ndarray[Any, np.dtype[np.float64]] = logprobs[range(len(completion)), completion]
    return found


def kl(reference: ReferenceModel, sae: Path, field: Mapping[str, Any]) -> float:
    """Mean KL of unsteered against steered over the scored positions of the neutral texts."""
    found = []
    for given in NEUTRAL:
        # Prompt tokens are scored as well: everything but the first, as of one long completion.
        ids = given["prompt"]
        saes = {"a": ReferenceSAE(sae)}
        p, q = (
            reference.trace(ids[:1], ids[1:], saes, one)[0].double().numpy()
            for one in (None, field)
        )
        found.append((np.exp(p) * (p - q)).sum(axis=1))
    return float(np.concatenate(found).mean())


@pytest.fixture(scope="module")
def suggested(llm: Any) -> dict[str, Any]:
    told: list[tuple[int, int]] = []
    body = {
        "positive": WANTED,
        "negative": UNWANTED,
        "neutral": NEUTRAL,
        "budget": {"metric": "kl", "value": 0.2},
        "max_edits": 3,
    }
    answer: dict[str, Any] = llm.suggest(body, lambda done, of: told.append((done, of)))
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    return answer


def test_suggested_edit_keeps_the_budget_and_gains_on_what_was_held_out(
    suggested: dict[str, Any], reference: ReferenceModel, sae: Path
) -> None:
    field = suggested["steering"]
    assert field is not None
    assert 1 <= len(field["interventions"]) <= 3
    assert suggested["kl"] <= 0.2
    assert suggested["kl"] == pytest.approx(kl(reference, sae, field), rel=1e-2)
    for name, first in (("fit", 0), ("held_out", 1)):
        sides = (WANTED[first::2], UNWANTED[first::2])
        before, after = suggested[name]["before"], suggested[name]["after"]
        assert after > before
        assert before == pytest.approx(log_odds(reference, sae, sides, None), abs=1e-3)
        assert after == pytest.approx(log_odds(reference, sae, sides, field), abs=1e-2)


def test_all_that_was_tried_kept_the_budget_and_the_answer_is_the_best_of_it(
    suggested: dict[str, Any],
) -> None:
    tried = suggested["tried"]
    assert len(tried) > 4
    assert all(0 <= one["kl"] <= 0.2 for one in tried)
    assert tried[-1]["steering"] == suggested["steering"]
    alone = [one["fit"] for one in tried if len(one["steering"]["interventions"]) == 1]
    assert suggested["fit"]["after"] >= max(alone) - 0.05


def test_nothing_is_suggested_where_nothing_is_wanted(llm: Any) -> None:
    same = [text(50, range(4, 300)), text(51, range(4, 300))]
    answer = llm.suggest({"positive": same, "negative": same, "neutral": NEUTRAL[:1]})
    assert answer["steering"] is None
    assert answer["kl"] == 0
    for name in ("fit", "held_out"):
        assert answer[name]["before"] == answer[name]["after"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"positive": WANTED[:1]}, ("invalid_value", "positive")),
        ({"negative": [WANTED[0], {"prompt": "a"}]}, ("invalid_value", "negative[1].completion")),
        ({"sae": "b"}, ("unknown_sae", "sae")),
        ({"budget": {"metric": "nll"}}, ("invalid_value", "budget.metric")),
        ({"budget": {"value": 0}}, ("invalid_value", "budget.value")),
        ({"budget": "0.1"}, ("invalid_type", "budget")),
        ({"max_edits": 0}, ("invalid_value", "max_edits")),
        ({"neutral": [{"prompt": [1]}]}, ("invalid_value", "neutral[0]")),
        ({"positive": [text(1, range(4, 9), prompt=100)] * 256}, ("study_too_large", None)),
    ],
)
def test_suggestion_that_cannot_be_made_is_refused(
    llm: Any, change: dict[str, Any], wanted: tuple[str, str | None]
) -> None:
    body = {"positive": WANTED, "negative": UNWANTED, "neutral": NEUTRAL, **change}
    with pytest.raises(SteeringError) as refused:
        llm.suggest(body)
    assert (refused.value.code, refused.value.param) == wanted


# Offline


async def test_study_runs_in_a_notebook_whose_thread_has_an_event_loop(llm: Any) -> None:
    field = {"interventions": [{"feature": 3, "op": "ablate"}]}
    (edit,) = llm.forecast({"steering": field})["edits"]
    assert edit["norm"] == pytest.approx(4.0, rel=1e-5)
    assert llm.contrast("a", {"positive": POSITIVE, "negative": NEGATIVE})["positive"]


def test_text_of_characters_is_that_of_its_tokens(llm: Any) -> None:
    words, more = "The quick brown fox", " jumps over the lazy dog"
    tokenizer = llm.get_tokenizer()
    of_ids = {
        "prompt": tokenizer.encode(words),
        "completion": tokenizer.encode(more, add_special_tokens=False),
    }
    body = {"positive": [{"prompt": words, "completion": more}], "negative": NEGATIVE}
    answer = llm.contrast("a", body)
    assert answer == llm.contrast("a", {**body, "positive": [of_ids]})


def test_answer_of_a_conversation_begins_where_the_model_would_answer(llm: Any) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer = llm.get_tokenizer()
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    more = tokenizer.encode(" Paris is", add_special_tokens=False)
    body = {"positive": [{"messages": messages, "completion": " Paris is"}], "negative": NEGATIVE}
    answer = llm.contrast("a", body)
    of_ids = {"prompt": rendered, "completion": more}
    assert answer == llm.contrast("a", {**body, "positive": [of_ids]})


def test_model_that_the_engine_does_not_run_is_refused(llm: Any) -> None:
    with pytest.raises(SteeringError) as refused:
        llm.forecast({"steering": {"interventions": []}, "model": "other"})
    assert (refused.value.code, refused.value.param) == ("invalid_value", "model")
