"""`stop_when` and `read.stream` over HTTP: streamed answers against answers that are not."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from tests.engine.server import MODEL, LiveServer

pytest_plugins = ("tests.engine.server",)

pytestmark = pytest.mark.timeout(900)

CHAT: Final = "/v1/chat/completions"
TEXT: Final = "/v1/completions"
GENERATED: Final = 16
SAE: Final = "second"


def body(path: str, steering: Any, **more: Any) -> dict[str, Any]:
    said: dict[str, Any] = (
        {"messages": [{"role": "user", "content": "Tell me about the sea."}]}
        if path == CHAT
        else {"prompt": "The sea at night is"}
    )
    options = {"model": MODEL, "max_tokens": GENERATED, "temperature": 0, "steering": steering}
    return {**said, **options, "return_token_ids": True, **more}


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


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_stopped_answer_is_the_same_streamed_and_whole(live_server: LiveServer, path: str) -> None:
    read = {"read": {"sae": SAE, "top_k": 64}, "positions": {"prompt": False}}
    plain = whole(live_server, path, read)
    tokens = read_tokens(plain["steering"]["read"])
    seen: set[int] = set()
    late = None
    for token in tokens:
        features = dict(map(tuple, token["features"]))
        if len(seen) and features.keys() - seen and token is not tokens[1]:
            late = token["position"], min(features.keys() - seen)
            break
        seen |= features.keys()
    assert late is not None, tokens
    position, feature = late
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


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {}),
        (TEXT, {}),
        ("/v1/responses", {"input": "The sea", "stream": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "stream": True}),
    ],
)
def test_read_stream_is_refused_where_no_chunk_could_carry_it(
    live_server: LiveServer, path: str, more: dict[str, Any]
) -> None:
    field = {"read": {"sae": SAE, "stream": True}}
    request = body(path, field) if not more else {"model": MODEL, "max_tokens": 4, **more}
    answer = live_server.client.post(path, json={**request, "steering": field})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    if path != "/v1/messages":
        assert (error["code"], error["param"]) == (
            "unsupported_combination",
            "steering.read.stream",
        )
