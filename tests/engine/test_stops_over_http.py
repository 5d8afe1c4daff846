"""`stop_when` and `read.stream` over HTTP: streamed answers against answers that are not."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.engine.server import MODEL, LiveServer

pytest_plugins = ("tests.engine.server",)

pytestmark = pytest.mark.timeout(900)

CHAT: Final = "/v1/chat/completions"
TEXT: Final = "/v1/completions"
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"
ASKED: Final = [{"role": "user", "content": "Tell me about the sea."}]
GENERATED: Final = 16
SAE: Final = "second"


def body(path: str, steering: Any, **more: Any) -> dict[str, Any]:
    options = {"model": MODEL, "temperature": 0, "steering": steering, **more}
    if path == RESPONSES:
        return {"input": ASKED, "max_output_tokens": GENERATED, **options}
    options = {"max_tokens": GENERATED, **options}
    if path == MESSAGES:
        return {"messages": ASKED, **options}
    said = {"messages": ASKED} if path == CHAT else {"prompt": "The sea at night is"}
    return {**said, "return_token_ids": True, **options}


def whole(live_server: LiveServer, path: str, steering: Any, **more: Any) -> dict[str, Any]:
    answer = live_server.client.post(path, json=body(path, steering, **more))
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def chunks(live_server: LiveServer, path: str, steering: Any, **more: Any) -> list[dict[str, Any]]:
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    found = []
    with live_server.client.stream(
        "POST", path, json=body(path, steering, **usage, **more)
    ) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line.removeprefix("data: ")))
    assert "error" not in found[-1], found[-1]
    return found


def text_of(choice: dict[str, Any]) -> str:
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


def joined(found: list[dict[str, Any]], index: int = 0) -> tuple[str, list[int], Any, Any]:
    """Text, token ids, finish and stop reason of one choice of a streamed answer."""
    text, finish, stop = "", None, None
    ids: list[int] = []
    for chunk in found:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            ids += choice.get("token_ids") or []
            finish = choice.get("finish_reason") or finish
            stop = choice.get("stop_reason") or stop
    return text, ids, finish, stop


def read_tokens(read: dict[str, Any]) -> list[dict[str, Any]]:
    tokens: list[dict[str, Any]] = read["tokens"]
    return tokens


def streamed_reads(found: list[dict[str, Any]], index: int | None = None) -> list[Any]:
    tokens = []
    for chunk in found:
        told = chunk.get("steering", {})
        if index is not None:
            told = next((c for c in told.get("choices", ()) if c["index"] == index), {})
        if "read" in told:
            assert told["read"]["sae"] == SAE
            tokens += read_tokens(told["read"])
    return tokens


def late_feature(tokens: list[dict[str, Any]]) -> tuple[int, int]:
    """A position that is neither the first nor the second, and a feature that fires first there."""
    seen: set[int] = set()
    for token in tokens:
        features = dict(map(tuple, token["features"]))
        if seen and features.keys() - seen and token is not tokens[1]:
            return token["position"], min(features.keys() - seen)
        seen |= features.keys()
    raise AssertionError(tokens)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_stopped_answer_is_the_same_streamed_and_whole(live_server: LiveServer, path: str) -> None:
    read = {"read": {"sae": SAE, "top_k": 64}, "positions": {"prompt": False}}
    plain = whole(live_server, path, read)
    position, feature = late_feature(read_tokens(plain["steering"]["read"]))
    field = {"stop_when": {"sae": SAE, "feature": feature, "above": 0}}
    stopped = whole(live_server, path, field)
    [choice] = stopped["choices"]
    count = position - plain["usage"]["prompt_tokens"] + 1
    assert choice["token_ids"] == plain["choices"][0]["token_ids"][:count]
    assert text_of(plain["choices"][0]).startswith(text_of(choice))
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "steering")
    assert stopped["usage"]["completion_tokens"] == count
    assert stopped["steering"]["stopped"]["position"] == position
    found = chunks(live_server, path, field)
    expected = (text_of(choice), choice["token_ids"], "stop", "steering")
    assert joined(found) == expected
    assert found[-1]["steering"] == stopped["steering"]
    [usage] = [chunk["usage"] for chunk in found if chunk.get("usage")]
    assert usage["completion_tokens"] == count


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_streamed_reads_are_the_whole_read_once_each_and_in_time(
    live_server: LiveServer, path: str
) -> None:
    plain = whole(live_server, path, {"read": {"sae": SAE, "top_k": 3}, "report": True})
    found = chunks(
        live_server, path, {"read": {"sae": SAE, "top_k": 3, "stream": True}, "report": True}
    )
    assert joined(found)[1] == plain["choices"][0]["token_ids"]
    told = streamed_reads(found)
    for ours, theirs in zip(told, read_tokens(plain["steering"]["read"]), strict=True):
        assert {**ours, "features": None} == {**theirs, "features": None}
        assert [i for i, _ in ours["features"]] == [i for i, _ in theirs["features"]]
        assert [f for _, f in ours["features"]] == pytest.approx(
            [f for _, f in theirs["features"]], rel=1e-3
        )
    assert found[-1]["steering"]["interventions"] == []
    assert "read" not in found[-1]["steering"]
    # The prompt's are in a chunk of their own before any token.
    assert found[0]["choices"] == []
    assert {token["phase"] for token in read_tokens(found[0]["steering"]["read"])} == {"prompt"}
    # A token's features come at most one chunk after its text.
    prompt_len, sent = plain["usage"]["prompt_tokens"], 0
    known: set[int] = set()
    for chunk in found:
        known |= {token["position"] for token in streamed_reads([chunk])}
        ids = [i for choice in chunk["choices"] for i in choice.get("token_ids") or []]
        if ids:
            assert known >= set(range(prompt_len, prompt_len + sent))
            sent += len(ids)
    assert sent == GENERATED


def test_each_choice_streams_its_own_read(live_server: LiveServer) -> None:
    more = {"n": 2, "temperature": 1.0, "seed": 7}
    field: dict[str, Any] = {
        "read": {"sae": SAE, "top_k": 2},
        "positions": {"special_tokens": True},
    }
    plain = whole(live_server, TEXT, field, **more)
    found = chunks(live_server, TEXT, {**field, "read": {**field["read"], "stream": True}}, **more)
    for i, choice in enumerate(plain["steering"]["choices"]):
        assert joined(found, i)[1] == plain["choices"][i]["token_ids"]
        told = streamed_reads(found, i)
        assert [t["position"] for t in told] == [t["position"] for t in choice["read"]["tokens"]]


def test_stopped_answer_streams_the_read_of_its_last_token(live_server: LiveServer) -> None:
    read = {"sae": SAE, "top_k": 64}
    plain = whole(live_server, TEXT, {"read": read, "positions": {"prompt": False}})
    token = read_tokens(plain["steering"]["read"])[0]
    feature = int(token["features"][0][0])
    field = {
        "read": {**read, "stream": True},
        "positions": {"prompt": False},
        "stop_when": {"sae": SAE, "feature": feature, "above": 0},
    }
    found = chunks(live_server, TEXT, field)
    assert len(joined(found)[1]) == 1
    assert [t["position"] for t in streamed_reads(found)] == [token["position"]]
    assert found[-1]["steering"]["stopped"]["position"] == token["position"]


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES, MESSAGES])
def test_read_stream_is_refused_where_no_chunk_could_carry_it(
    live_server: LiveServer, path: str
) -> None:
    field = {"read": {"sae": SAE, "stream": True}}
    answer = live_server.client.post(path, json=body(path, field))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    if path == MESSAGES:
        assert error["type"] == "invalid_request_error"
        assert "read.stream" in error["message"]
    else:
        assert (error["code"], error["param"]) == (
            "unsupported_combination",
            "steering.read.stream",
        )


# --- /v1/responses and /v1/messages ---------------------------------------------------------------


def answered(path: str, answer: dict[str, Any]) -> tuple[str, int, str, Any]:
    """Text, tokens counted, why it ended, and what was matched, of a whole answer."""
    if path == RESPONSES:
        [item] = answer["output"]
        [part] = item["content"]
        return part["text"], answer["usage"]["output_tokens"], answer["status"], None
    [block] = answer["content"]
    tokens = answer["usage"]["output_tokens"]
    return block["text"], tokens, answer["stop_reason"], answer.get("stop_sequence")


@pytest.mark.parametrize(
    ("path", "ended"),
    [(RESPONSES, ("completed", None)), (MESSAGES, ("stop_sequence", "steering"))],
)
def test_feature_ends_an_answer_of_the_other_two_apis(
    live_server: LiveServer, path: str, ended: tuple[str, Any]
) -> None:
    read = {"read": {"sae": SAE, "top_k": 64}, "positions": {"prompt": False}}
    plain = whole(live_server, path, read)
    tokens = read_tokens(plain["steering"]["read"])
    position, feature = late_feature(tokens)
    count = position - tokens[0]["position"] + 1
    field = {"stop_when": {"sae": SAE, "feature": feature, "above": 0}}
    stopped = whole(live_server, path, field)
    text, num_tokens, *why = answered(path, stopped)
    assert text == "".join(token["text"] for token in tokens[:count])
    assert answered(path, plain)[0].startswith(text)
    assert (num_tokens, *why) == (count, *ended)
    assert stopped["steering"]["stopped"]["position"] == position
    events = live_server.stream(path, body(path, field))
    assert "".join(deltas(events)) == text
    if path == RESPONSES:
        last = events[-1]["response"]
        assert answered(path, last) == (text, count, *ended)
    else:
        last = events[-1]
        [delta] = [event for event in events if event["type"] == "message_delta"]
        assert (delta["delta"]["stop_reason"], delta["delta"]["stop_sequence"]) == ended
        assert delta["usage"]["output_tokens"] == count
    assert last["steering"] == stopped["steering"]


def deltas(events: list[dict[str, Any]]) -> list[str]:
    """The pieces of text of either API's stream."""
    pieces = []
    for event in events:
        if event["type"] == "response.output_text.delta":
            pieces.append(event["delta"])
        elif event["type"] == "content_block_delta":
            pieces.append(event["delta"]["text"])
    return pieces


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_events_of_the_other_two_apis_carry_the_read_as_it_happens(
    live_server: LiveServer, path: str
) -> None:
    read = {"sae": SAE, "top_k": 3}
    expected = whole(live_server, path, {"read": read, "report": True})["steering"]
    events = live_server.stream(
        path, body(path, {"read": {**read, "stream": True}, "report": True})
    )
    report = events[-1]["response"] if path == RESPONSES else events[-1]
    assert report["steering"] == {key: expected[key] for key in expected if key != "read"}
    told = [event for event in events if "read" in event.get("steering", {})]
    tokens = [token for event in told for token in read_tokens(event["steering"]["read"])]
    for ours, theirs in zip(tokens, read_tokens(expected["read"]), strict=True):
        assert {**ours, "features": None} == {**theirs, "features": None}
        assert [i for i, _ in ours["features"]] == [i for i, _ in theirs["features"]]
        assert [f for _, f in ours["features"]] == pytest.approx(
            [f for _, f in theirs["features"]], rel=1e-3
        )
    # The prompt's come before any text, and a token's at most one piece of text later.
    assert read_tokens(told[0]["steering"]["read"])[-1]["phase"] == "prompt"
    prompt_len = read_tokens(told[0]["steering"]["read"])[-1]["position"] + 1
    known, pieces = prompt_len, 0
    for event in events:
        if "read" in event.get("steering", {}):
            known = read_tokens(event["steering"]["read"])[-1]["position"] + 1
        if deltas([event]):
            assert known >= prompt_len + pieces
            pieces += 1
    assert pieces > GENERATED // 2


def test_openai_sdk_takes_a_response_that_is_read_as_it_streams(live_server: LiveServer) -> None:
    field = {"steering": {"read": {"sae": SAE, "top_k": 1, "stream": True}}}
    client = OpenAI(base_url=f"{live_server.base_url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": MODEL, "input": "The sea", "max_output_tokens": 6}
    with client:
        raw = list(client.responses.create(**asked, stream=True, extra_body=field))
        with client.responses.stream(**asked, extra_body=field) as stream:
            text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            assert stream.get_final_response().output_text == text
    told = [event for event in raw if "steering" in (event.model_extra or {})]
    assert "response.output_text.delta" in {event.type for event in told}
    positions = [
        t["position"] for e in told for t in (e.model_extra or {})["steering"]["read"]["tokens"]
    ]
    assert positions == sorted(set(positions))


def test_anthropic_sdk_takes_a_message_that_is_read_as_it_streams(live_server: LiveServer) -> None:
    field = {"steering": {"read": {"sae": SAE, "top_k": 1, "stream": True}, "report": True}}
    client = Anthropic(base_url=live_server.base_url, api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": MODEL, "messages": ASKED, "max_tokens": 6}
    with client.messages.stream(**asked, extra_body=field) as stream:
        events = list(stream)
        final = stream.get_final_text()
    # The helper's own events, made of the API's, come on top; its last is made anew.
    told = [event for event in events if "steering" in (event.model_extra or {})]
    assert told[0].type == "message_start"
    assert "content_block_delta" in {event.type for event in told}
    assert "".join(event.text for event in events if event.type == "text") == final
    with client:
        [*_, last] = client.messages.create(**asked, stream=True, extra_body=field)
    assert last.type == "message_stop"
    assert (last.model_extra or {})["steering"]["interventions"] == []
