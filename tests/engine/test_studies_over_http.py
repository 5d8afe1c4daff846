"""Studies on a real server: what a client sees of them, and what is left when it leaves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import pytest

from server.__main__ import main
from tests import demo_sae

if TYPE_CHECKING:
    from tests.engine.server import LiveServer

pytest_plugins = ("tests.engine.server",)
# The first test to ask waits for the server.
pytestmark = pytest.mark.timeout(600)

#: Seconds in which requests must be gone; never waited for in full.
PATIENCE: Final = 60
CONTRAST: Final = "/v1/saes/l14/contrast"
ELVISH: Final = (
    "The elves and the dwarves met the orcs.",
    "An old troll guarded the bridge of the elves.",
    "Three goblins and an elf rode to the dwarf king.",
)
PLAIN: Final = (
    "The train to the coast leaves at nine.",
    "She bought two pounds of apples at the market.",
    "The committee voted on the budget on Monday.",
)
SIDES: Final[dict[str, Any]] = {
    "positive": [{"prompt": text} for text in ELVISH],
    "negative": [{"prompt": text} for text in PLAIN],
    "pool": "max",
    "by": "difference",
    "top_k": 5,
}
FORECAST: Final[dict[str, Any]] = {
    "steering": {"interventions": [{"sae": "l14", "feature": demo_sae.ELVES, "op": "ablate"}]}
}


def answer(server: LiveServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = server.client.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_contrast_finds_the_feature_that_two_sets_of_texts_part_by(
    live_server: LiveServer,
) -> None:
    found = answer(live_server, CONTRAST, SIDES)
    elves = next(one for one in found["positive"] if one["feature"] == demo_sae.ELVES)
    assert (elves["auroc"], elves["mean_negative"]) == (1.0, 0.0)
    assert 0 < elves["suggested_value"] <= elves["mean_positive"]
    assert "elves" in elves["label"]


def test_stream_ends_with_the_answer_that_is_given_without_one(live_server: LiveServer) -> None:
    plain = answer(live_server, CONTRAST, SIDES)
    with live_server.client.stream("POST", CONTRAST, json={**SIDES, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    *events, end = lines
    *progress, result = map(json.loads, events)
    assert end == "[DONE]"
    assert progress[-1] == {"object": "steering.progress", "done": 6, "of": 6}
    for side in ("positive", "negative"):
        assert [f["feature"] for f in result[side]] == [f["feature"] for f in plain[side]]


def test_conversation_is_read_as_the_chat_route_renders_it(live_server: LiveServer) -> None:
    messages = [{"role": "user", "content": ELVISH[0]}]
    side = {"messages": messages, "completion": "The elves sang."}
    ids = live_server.post("/tokenize", {"messages": messages}).json()["tokens"]
    body = {**SIDES, "positive": [side], "negative": [{**side, "completion": "No."}], "by": "auroc"}
    of_ids = {**body, "positive": [{"prompt": ids, "completion": side["completion"]}]}
    assert answer(live_server, CONTRAST, body) == answer(live_server, CONTRAST, of_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_study_leaves_the_engine_with_its_client(live_server: LiveServer, stream: bool) -> None:
    words = " ".join(ELVISH) * 20
    texts = [{"prompt": f"{i} {words}"} for i in range(200)]
    body = {"positive": texts, "negative": texts[:50], "stream": stream}
    before = _answered(live_server)
    request = live_server.client.build_request("POST", CONTRAST, json=body)
    if stream:
        response = live_server.client.send(request, stream=True)
        assert response.status_code == 200, response.read()
        assert b"steering.progress" in next(response.iter_bytes())
        response.close()
    else:
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), 2.0)
        with pytest.raises(httpx.ReadTimeout):
            live_server.client.send(request)
    deadline = time.monotonic() + PATIENCE
    while not _alone(live_server):
        assert time.monotonic() < deadline, "a study whose client left still runs"
    assert _answered(live_server) - before < len(texts)
    assert answer(live_server, CONTRAST, SIDES)["positive"]


def _answered(server: LiveServer) -> int:
    """Requests that the engine has run to their end, but for those that were aborted."""
    lines = server.client.get("/metrics").text.splitlines()
    ended = (line for line in lines if line.startswith("vllm:request_success_total{"))
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in ended if '"abort"' not in line)


def _alone(server: LiveServer) -> bool:
    """Whether nothing ran beside a request: a study's texts would have, in the same passes."""
    before = _answered(server)
    server.tokens("The train to the coast", max_tokens=16)
    return _answered(server) == before + 1


def test_command_runs_the_studies_of_a_file_on_a_server(
    live_server: LiveServer, tmp_path: Path
) -> None:
    file, out = tmp_path / "studies.json", tmp_path / "answers.json"
    forecast = {"route": "/v1/steering/forecast", "body": FORECAST}
    contrast = {"study": "contrast", "sae": "l14", "body": SIDES}
    file.write_text(json.dumps({"table 1": contrast, "table 2": forecast}))
    words = ["study", str(file), "--url", live_server.base_url, "-o", str(out)]
    assert main(words) == 0
    answers = json.loads(out.read_text())
    assert [*answers] == ["table 1", "table 2"]
    features = [one["feature"] for one in answers["table 1"]["positive"]]
    assert demo_sae.ELVES in features
    assert answers["table 2"] == answer(live_server, "/v1/steering/forecast", FORECAST)


def test_study_that_is_refused_has_its_error_in_its_place(
    live_server: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "studies.json"
    wrong = {"study": "contrast", "sae": "nowhere", "body": SIDES}
    file.write_text(json.dumps([wrong, {"study": "forecast", "body": FORECAST}]))
    assert main(["study", str(file), "--url", f"{live_server.base_url}/v1"]) == 1
    refused, right = json.loads(capsys.readouterr().out)
    assert refused["error"]["code"] == "unknown_sae"
    assert right["edits"][0]["feature"] == demo_sae.ELVES
