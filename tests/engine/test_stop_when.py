"""`stop_when` on real engines, against what a plain `read` of the same generation says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from steering.errors import SteeringError
from tests.engine.engine import Engine, tiny_engine
from tests.engine.outputs import tokens

GENERATED: Final = 24
PROMPT: Final = tokens(1, 9)
#: Of the sampled choices.
SEED: Final = 5


@pytest.fixture(scope="module")
def engine(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """Scheduled synchronously: on a CPU vLLM knows nothing else, whatever is asked for."""
    made = tiny_engine(
        tiny_model("llama"), tmp_path_factory.mktemp("saes"), ({}, {"layer": 0, "seed": 2})
    )
    yield made
    made.shut_down()


def generate(engine: Engine, fields: Any, **sampling: Any) -> list[Any]:
    """vLLM's outputs of `PROMPT`, one for each field."""
    from vllm import SamplingParams

    options = {"max_tokens": GENERATED, "temperature": 0.0, "logprobs": 1, "ignore_eos": True}
    params = [
        SamplingParams(
            **{**options, "detokenize": False, **sampling},
            extra_args=None if field is None else {"steering": field},
        )
        for field in fields
    ]
    prompts: Any = [{"prompt_token_ids": PROMPT}] * len(params)
    return list(engine.llm.generate(prompts, params, use_tqdm=False))


def reports(engine: Engine, output: Any) -> list[Any]:
    from steering.vllm.results import results_of

    return results_of(engine.llm, output)


def activations(
    engine: Engine, sae: str = "a", **sampling: Any
) -> tuple[Any, list[dict[int, Any]]]:
    """The output of a plain read, and of each choice f by position and feature, generated only."""
    read = {"read": {"sae": sae, "top_k": 64}, "positions": {"prompt": False}}
    [output] = generate(engine, [read], **sampling)
    by_choice = []
    for report in reports(engine, output):
        found = {t["position"]: dict(map(tuple, t["features"])) for t in report.read["tokens"]}
        by_choice.append(found)
    return output, by_choice


def late_feature(of_choice: dict[int, dict[int, float]], after: int) -> tuple[int, int, float]:
    """A feature that first fires some way into the generation: its position there and its f."""
    seen: set[int] = set()
    for position, features in sorted(of_choice.items()):
        new = features.keys() - seen
        if position >= len(PROMPT) + after and new:
            feature = min(new)
            return feature, position, features[feature]
        seen |= features.keys()
    raise AssertionError("no feature begins to fire late enough")


def largest(of_tokens: Iterable[dict[int, float]]) -> dict[int, float]:
    """The largest activation of each feature over some tokens."""
    found: dict[int, float] = {}
    for features in of_tokens:
        for feature, f in features.items():
            found[feature] = max(f, found.get(feature, 0.0))
    return found


def stop_at(feature: int, above: float = 0.0, sae: str = "a") -> dict[str, Any]:
    return {"sae": sae, "feature": feature, "above": above}


def logprobs_of(choice: Any) -> list[float]:
    return [
        entry[token].logprob for entry, token in zip(choice.logprobs, choice.token_ids, strict=True)
    ]


def test_first_generated_token_above_the_threshold_is_the_last(engine: Engine) -> None:
    plain, [found] = activations(engine)
    feature, position, f = late_feature(found, after=3)
    count = position - len(PROMPT) + 1
    [stopped, other] = generate(engine, [{"stop_when": stop_at(feature)}, None])
    [choice], [whole] = stopped.outputs, plain.outputs
    assert list(choice.token_ids) == list(whole.token_ids)[:count]
    assert logprobs_of(choice) == pytest.approx(logprobs_of(whole)[:count], abs=1e-4)
    assert choice.cumulative_logprob == pytest.approx(sum(logprobs_of(choice)))
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "steering")
    assert list(other.outputs[0].token_ids) == list(whole.token_ids)
    assert not engine.scheduler.running
    [report] = reports(engine, stopped)
    assert report.to_json(False) == {
        "stopped": {
            "sae": "a",
            "feature": feature,
            "position": position,
            "activation": pytest.approx(f, rel=1e-4),
        }
    }


def test_threshold_is_exceeded_not_reached(engine: Engine) -> None:
    _, [found] = activations(engine)
    feature, _, _ = late_feature(found, after=2)
    by_position = {p: fs[feature] for p, fs in sorted(found.items()) if feature in fs}
    largest = max(by_position.values())
    above = 0.999 * largest
    first = min(p for p, f in by_position.items() if f > above)
    [low, high] = generate(
        engine, [{"stop_when": stop_at(feature, above)}, {"stop_when": stop_at(feature, 1e5)}]
    )
    assert len(low.outputs[0].token_ids) == first - len(PROMPT) + 1
    assert len(high.outputs[0].token_ids) == GENERATED
    assert (high.outputs[0].finish_reason, high.outputs[0].stop_reason) == ("length", None)
    [report] = reports(engine, high)
    assert report.to_json(False) == {}
    reports(engine, low)


def test_any_of_several_conditions_at_two_layers_stops(engine: Engine) -> None:
    _, [at_a] = activations(engine, "a")
    _, [at_b] = activations(engine, "b")
    late, late_position, _ = late_feature(at_a, after=6)
    early, early_position, _ = late_feature(at_b, after=2)
    assert early_position < late_position
    [output] = generate(engine, [{"stop_when": [stop_at(late), stop_at(early, sae="b")]}])
    [report] = reports(engine, output)
    assert report.stopped is not None
    assert (report.stopped["sae"], report.stopped["position"]) == ("b", early_position)
    assert len(output.outputs[0].token_ids) == early_position - len(PROMPT) + 1


def test_prompt_does_not_stop_whatever_fires_there(engine: Engine) -> None:
    read = {"read": {"sae": "a", "top_k": 64}, "positions": {"generation": False}}
    [output] = generate(engine, [read], max_tokens=1)
    [report] = reports(engine, output)
    assert report.read is not None
    in_prompt = largest([dict(map(tuple, t["features"])) for t in report.read["tokens"]])
    _, [found] = activations(engine)
    generated = largest(found.values())
    between = [
        stop_at(feature, (f + generated.get(feature, 0.0)) / 2)
        for feature, f in sorted(in_prompt.items())
        if f > generated.get(feature, 0.0) + 0.01
    ]
    assert between
    [output] = generate(engine, [{"stop_when": between[:8]}])
    assert len(output.outputs[0].token_ids) == GENERATED


def test_report_and_read_count_the_stopping_token(engine: Engine) -> None:
    _, [found] = activations(engine)
    feature, position, _ = late_feature(found, after=3)
    field = {
        "interventions": [{"sae": "a", "feature": feature, "op": "add", "value": 0}],
        "positions": {"prompt": False},
        "stop_when": stop_at(feature),
        "report": True,
        "read": {"sae": "a", "top_k": 64},
    }
    [edited] = generate(engine, [field])
    [report] = reports(engine, edited)
    body = report.to_json(True)
    assert body["interventions"][0]["tokens_edited"] == position - len(PROMPT) + 1
    assert body["interventions"][0]["tokens_active"] == 1
    assert [token["position"] for token in body["read"]["tokens"]][-1] == position
    assert body["stopped"]["position"] == position
    [bare] = generate(engine, [{"stop_when": stop_at(feature), "report": True}])
    [report] = reports(engine, bare)
    assert report.to_json(True)["interventions"] == []


def test_each_of_several_choices_stops_by_itself(engine: Engine) -> None:
    sampling: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": SEED}
    plain, found = activations(engine, **sampling)
    feature, _, _ = late_feature(found[0], after=3)
    [output] = generate(engine, [{"stop_when": stop_at(feature)}], **sampling)
    made = sorted(output.outputs, key=lambda choice: choice.index)
    for choice, whole, of_choice, report in zip(
        made,
        sorted(plain.outputs, key=lambda c: c.index),
        found,
        reports(engine, output),
        strict=True,
    ):
        fires = [p for p, features in sorted(of_choice.items()) if feature in features]
        if fires:
            count = fires[0] - len(PROMPT) + 1
            assert list(choice.token_ids) == list(whole.token_ids)[:count]
            assert report.stopped is not None
            assert report.stopped["position"] == fires[0]
        else:
            assert list(choice.token_ids) == list(whole.token_ids)
            assert report.stopped is None


def test_what_ends_the_answer_first_is_its_reason(engine: Engine) -> None:
    plain, [found] = activations(engine)
    feature, position, _ = late_feature(found, after=3)
    count = position - len(PROMPT) + 1
    field = {"stop_when": stop_at(feature)}
    [shorter] = generate(engine, [field], max_tokens=count)
    # The token that would stop never entered the model.
    assert (shorter.outputs[0].finish_reason, shorter.outputs[0].stop_reason) == ("length", None)
    assert reports(engine, shorter)[0].stopped is None
    [longer] = generate(engine, [field], max_tokens=count + 1)
    assert longer.outputs[0].stop_reason == "steering"
    assert len(longer.outputs[0].token_ids) == count
    reports(engine, longer)
    last = list(plain.outputs[0].token_ids)[count - 1]
    [by_id] = generate(engine, [field], stop_token_ids=[last])
    assert by_id.outputs[0].stop_reason == last
    reports(engine, by_id)
    # min_tokens holds off end-of-sequence and stop strings, not what the request itself asked for.
    [least] = generate(engine, [field], min_tokens=GENERATED)
    assert len(least.outputs[0].token_ids) == count
    reports(engine, least)


def test_read_that_streams_is_refused_where_nothing_is_streamed(engine: Engine) -> None:
    with pytest.raises(SteeringError, match="streamed") as refused:
        generate(engine, [{"read": {"sae": "a", "stream": True}}])
    assert refused.value.param == "steering.read.stream"


def test_stop_string_that_reads_like_the_reason_is_refused(engine: Engine) -> None:
    with pytest.raises(SteeringError, match="stop string 'steering'") as refused:
        generate(engine, [{"stop_when": stop_at(1)}], stop=["steering"], detokenize=True)
    assert refused.value.param == "steering.stop_when"
