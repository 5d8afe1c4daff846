"""`SteeringLLM`: vLLM's `LLM` with SAEs, whose outputs say what steering did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import steering
from sae.errors import SAEError
from tests.engine.offline_arguments import ARGUMENTS
from tests.engine.outputs import tokens
from tests.models import make_tiny_sae

EDIT = {"interventions": [{"feature": 3, "op": "clamp", "value": 6}], "report": True}


@pytest.fixture(scope="module")
def llm(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    sae = make_tiny_sae(tmp_path_factory.mktemp("saes") / "a")
    arguments: dict[str, Any] = {"saes": [f"a={sae}"], "resident": "all", **ARGUMENTS}
    made = steering.SteeringLLM(str(tiny_model("llama")), **arguments)
    yield made
    made.llm_engine.engine_core.shutdown()


def params(**more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"max_tokens": 4, "temperature": 0.0, "ignore_eos": True, **more})


def prompt(seed: int) -> dict[str, Any]:
    return {"prompt_token_ids": tokens(seed, 12)}


def test_output_says_what_steering_did(llm: Any) -> None:
    (output,) = llm.generate(prompt(1), params(), steering=EDIT, use_tqdm=False)
    (entry,) = output.steering["interventions"]
    # All but the first token, and the last, which never entered the model.
    assert (entry["sae"], entry["tokens_edited"]) == ("a", 12 - 1 + 3)
    (clean,) = llm.generate(prompt(1), params(), use_tqdm=False)
    assert clean.steering is None


def test_what_a_gpu_is_to_hold_is_the_workers_to_know(llm: Any) -> None:
    assert llm.llm_engine.vllm_config.additional_config["steering"]["resident"] == "all"


def test_each_prompt_may_have_a_field_of_its_own(llm: Any) -> None:
    read = {"read": {"sae": "a", "top_k": 2}}
    fields = [EDIT, None, read]
    outputs = llm.generate([prompt(i) for i in range(3)], params(), steering=fields, use_tqdm=False)
    assert [output.steering and [*output.steering] for output in outputs] == [
        ["interventions", "tokens_cached", "edited"],
        None,
        ["read"],
    ]


def test_several_choices_are_listed(llm: Any) -> None:
    (output,) = llm.generate(
        prompt(1), params(n=2, temperature=1.0, seed=0), steering=EDIT, use_tqdm=False
    )
    assert [choice["index"] for choice in output.steering["choices"]] == [0, 1]


def test_field_may_stand_in_the_parameters_as_for_llm(llm: Any) -> None:
    given = params(extra_args={"steering": EDIT})
    outputs = llm.generate([prompt(1), prompt(2)], given, use_tqdm=False)
    assert [len(output.steering["interventions"]) for output in outputs] == [1, 1]
    assert given.extra_args == {"steering": EDIT}


def test_nothing_is_left_in_the_workers(llm: Any) -> None:
    (stats,) = llm.collective_rpc("steering_take_stats")
    assert stats["results_held"] == 0
    assert llm.llm_engine.input_processor.steering_accepted == {}


def test_invalid_field_is_a_value_error_before_anything_runs(llm: Any) -> None:
    with pytest.raises(ValueError, match="not in"):
        llm.generate(
            [prompt(1), prompt(2)],
            params(),
            steering=[EDIT, {"interventions": [{"feature": 10**6, "op": "ablate"}]}],
        )
    assert not llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize("field", [5, True, "l14", {1, 2}, [EDIT, 5]])
def test_field_of_a_wrong_type_is_a_value_error(llm: Any, field: Any) -> None:
    with pytest.raises(ValueError, match="expected an object"):
        llm.generate([prompt(1), prompt(2)], params(), steering=field)


def test_sae_that_does_not_fit_the_model_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    wide = make_tiny_sae(tmp_path / "wide", d_in=128)
    with pytest.raises(SAEError, match="128"):
        steering.SteeringLLM(str(tiny_model("llama")), saes=[f"a={wide}"], **ARGUMENTS)
    fits = make_tiny_sae(tmp_path / "fits")
    with pytest.raises(SAEError, match="two SAEs are named 'a'"):
        steering.SteeringLLM(str(tiny_model("llama")), saes=[f"a={fits}", f"a={fits}"], **ARGUMENTS)
