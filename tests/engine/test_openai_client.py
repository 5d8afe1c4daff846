"""A session of the plain `openai` package, as a user would write it; `steering` in `extra_body`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import openai
import pytest
from openai import OpenAI

from tests.demo_sae import ELVES, ELVES_MAX_ACTIVATION

if TYPE_CHECKING:
    from tests.engine.server import LiveServer

pytest_plugins = ("tests.engine.server",)
pytestmark = pytest.mark.timeout(600)

MODEL: Final = "smollm2"
ASKED: Final[list[Any]] = [{"role": "user", "content": "Tell me about your day."}]
FANTASY: Final = {"sae": "l14", "feature": ELVES, "op": "clamp", "value": 1.5, "unit": "max_act"}
STEERED: Final[dict[str, Any]] = {"steering": {"interventions": [FANTASY]}}
REPORTED: Final[dict[str, Any]] = {"steering": {"interventions": [FANTASY], "report": True}}

WEATHER: Final[Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
#: Harder, a model of this size stays in its JSON's white space.
MILDLY: Final = {"steering": {"interventions": [{**FANTASY, "value": 0.5}], "report": True}}


@pytest.fixture(scope="module")
def client(live_server: LiveServer) -> OpenAI:
    return OpenAI(base_url=f"{live_server.base_url}/v1", api_key="none", timeout=120, max_retries=0)


def steering_of(answer: Any) -> Any:
    """The field that the SDK does not know, as it hands it on."""
    return answer.model_extra["steering"]


def test_chat_is_steered_and_reported(client: OpenAI) -> None:
    ask = client.chat.completions.create
    plain = ask(model=MODEL, messages=ASKED, temperature=0, max_tokens=20)
    steered = ask(model=MODEL, messages=ASKED, temperature=0, max_tokens=20, extra_body=REPORTED)
    assert plain.choices[0].message.content != steered.choices[0].message.content
    assert "steering" not in (plain.model_extra or {})
    (entry,) = steering_of(steered)["interventions"]
    assert (entry["feature"], entry["op"]) == (ELVES, "clamp")
    assert entry["effective_value"] == pytest.approx(1.5 * ELVES_MAX_ACTIVATION)
    assert entry["tokens_edited"] > 19


def test_stream_ends_with_usage_and_then_the_report(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=ASKED,
        temperature=0,
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=REPORTED,
    )
    *chunks, usage, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    whole = client.chat.completions.create(
        model=MODEL, messages=ASKED, temperature=0, max_tokens=6, extra_body=REPORTED
    )
    assert text == whole.choices[0].message.content
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 6
    assert last.choices == []
    assert steering_of(last)["interventions"] == steering_of(whole)["interventions"]


def test_two_choices_are_both_steered(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASKED,
        n=2,
        seed=1,
        temperature=0.7,
        max_tokens=6,
        extra_body=REPORTED,
    )
    assert len(answer.choices) == 2
    assert [choice["index"] for choice in steering_of(answer)["choices"]] == [0, 1]
    for choice in steering_of(answer)["choices"]:
        assert choice["interventions"][0]["tokens_edited"] > 5


def test_tool_is_called_by_a_steered_model(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        max_tokens=60,
        extra_body=MILDLY,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    (call,) = calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
    assert steering_of(answer)["interventions"][0]["tokens_edited"] > 0


def test_tools_may_be_left_to_the_steered_model(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASKED,
        tools=[WEATHER],
        tool_choice="auto",
        temperature=0,
        max_tokens=6,
        extra_body=STEERED,
    )
    message = answer.choices[0].message
    assert message.content or message.tool_calls


def test_log_probabilities_are_those_of_the_steered_model(client: OpenAI) -> None:
    def logprobs(extra_body: dict[str, Any] | None) -> list[float]:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=ASKED,
            temperature=0,
            max_tokens=3,
            logprobs=True,
            top_logprobs=2,
            extra_body=extra_body,
        )
        found = answer.choices[0].logprobs
        assert found is not None
        assert all(len(token.top_logprobs) == 2 for token in found.content or ())
        return [token.logprob for token in found.content or ()]

    plain, steered = logprobs(None), logprobs(STEERED)
    assert len(plain) == len(steered) == 3
    assert abs(plain[0] - steered[0]) > 0.01


def test_steered_answer_still_fits_its_json_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}, "sunny": {"type": "boolean"}},
        "required": ["mood", "sunny"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASKED,
        temperature=0,
        max_tokens=40,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "day", "schema": schema, "strict": True},
        },
        extra_body=REPORTED,
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert found.keys() == {"mood", "sunny"}
    assert found["mood"] in ("good", "bad")
    assert steering_of(answer)["interventions"][0]["tokens_edited"] > 0


def test_text_completion_is_steered(client: OpenAI) -> None:
    def complete(extra_body: dict[str, Any] | None) -> str:
        answer = client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            temperature=0,
            max_tokens=12,
            extra_body=extra_body,
        )
        return answer.choices[0].text

    assert complete(None) != complete(STEERED)


def test_responses_api_is_steered(client: OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL,
        input="Tell me about your day.",
        temperature=0,
        max_output_tokens=6,
        extra_body=REPORTED,
    )
    assert answer.output_text
    assert steering_of(answer)["interventions"][0]["tokens_edited"] > 5


def test_stream_helper_of_chat_keeps_its_own_account_of_a_steered_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=ASKED, temperature=0, max_tokens=6, extra_body=REPORTED
    )
    with client.chat.completions.stream(
        model=MODEL, messages=ASKED, temperature=0, max_tokens=6, extra_body=REPORTED
    ) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == "length"
    reports = [steering_of(c) for c in chunks if "steering" in (c.model_extra or {})]
    assert [r["interventions"] for r in reports] == [steering_of(whole)["interventions"]]


def test_stream_helper_of_responses_ends_with_the_report(client: OpenAI) -> None:
    with client.responses.stream(
        model=MODEL,
        input="Tell me about your day.",
        temperature=0,
        max_output_tokens=6,
        extra_body=REPORTED,
    ) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text
    assert steering_of(final)["interventions"][0]["tokens_edited"] > 5


def test_refusal_is_a_bad_request_that_says_where(client: OpenAI) -> None:
    wrong = {"steering": {"interventions": [{**FANTASY, "feature": 70000}]}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=ASKED, extra_body=wrong)
    assert refused.value.code == "feature_out_of_range"
    assert refused.value.param == "steering.interventions[0].feature"
    assert refused.value.type == "invalid_request_error"
    assert "feature 70000 not in [0, 4608)" in refused.value.message


def test_model_is_listed_as_ever(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
