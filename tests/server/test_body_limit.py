"""The limit to a request's body: what it refuses, how, and what it leaves alone."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse

from server.body_limit import BodyLimit
from tests.server.bodies import BODIES
from tests.server.conftest import Server, StartServer
from tests.server.counters import value

LIMIT = 2048
SECRET = "a client's own words"
JSON = {"content-type": "application/json"}

#: Of every kind: those that take steering, those that refuse it, and one that is not there.
PATHS = [*BODIES, "/v1/embeddings", "/v1/saes/a/inspect", "/tokenize", "/invocations", "/nowhere"]
paths = pytest.mark.parametrize("path", PATHS)
ways = pytest.mark.parametrize("chunked", [False, True], ids=["stated", "chunked"])


@pytest.fixture
def server(start: StartServer) -> Server:
    return start(max_body_bytes=LIMIT)


@pytest.fixture
def guarded(start: StartServer) -> Server:
    return start("--api-key", "sesame", max_body_bytes=LIMIT)


def padded(path: str, size: int) -> bytes:
    """A valid body for `path` of this many bytes."""
    body = json.dumps(BODIES.get(path, {"prompt": "x"})).encode()
    return body[:-1] + b" " * (size - len(body)) + body[-1:]


def post(server: Server, path: str, body: bytes, chunked: bool, **headers: str) -> Any:
    """Send `body` with its length in the head, or in chunks of 500 bytes without."""
    cut = (body[i : i + 500] for i in range(0, len(body), 500))
    content: Any = cut if chunked else body
    return server.client.post(path, content=content, headers={**JSON, **headers})


class Wire:
    """What an ASGI server gives to an app and gets from it, for one request.

    After the chunks the client leaves, unless they are `complete`, the whole body.
    """

    def __init__(
        self, path: str, chunks: list[bytes], *, complete: bool = False, **headers: str
    ) -> None:
        self.chunks = iter(chunks)
        self.left = len(chunks)
        self.complete = complete
        self.sent: list[Any] = []
        self.broken = False
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "scheme": "http",
            "headers": [
                (name.replace("_", "-").encode(), text.encode())
                for name, text in {"content_type": "application/json", **headers}.items()
            ],
        }

    async def receive(self) -> Any:
        chunk = next(self.chunks, None)
        if chunk is None:
            return {"type": "http.disconnect"}
        self.left -= 1
        more = self.left > 0 or not self.complete
        return {"type": "http.request", "body": chunk, "more_body": more}

    async def send(self, message: Any) -> None:
        if self.broken:
            raise OSError("the client has left")
        self.sent.append(message)

    @property
    def statuses(self) -> list[int]:
        """Of the responses that were begun: one, or something is wrong."""
        return [m["status"] for m in self.sent if m["type"] == "http.response.start"]

    @property
    def text(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)

    async def ask(self, app: Any) -> None:
        await app(self.scope, self.receive, self.send)


def limited(app: Any, limit: int | None = LIMIT) -> Any:
    """`app` behind the limit, without a server around it."""
    state = SimpleNamespace(steering=SimpleNamespace(max_body_bytes=limit))

    async def run(scope: Any, receive: Any, send: Any) -> None:
        await BodyLimit(app)({**scope, "app": SimpleNamespace(state=state)}, receive, send)

    return run


# What is refused


@ways
@pytest.mark.parametrize("path", BODIES)
def test_body_of_exactly_the_limit_is_served(server: Server, path: str, chunked: bool) -> None:
    assert post(server, path, padded(path, LIMIT), chunked).status_code == 200


@ways
@paths
def test_body_of_one_byte_more_is_refused_on_every_route(
    server: Server, path: str, chunked: bool
) -> None:
    response = post(server, path, padded(path, LIMIT + 1), chunked)
    assert response.status_code == 413
    body = response.json()
    assert body.pop("type", None) == ("error" if path == "/v1/messages" else None)
    size = "at least 2049" if chunked else "2049"
    assert body == {
        "error": {
            "message": f"a body of {size} bytes, the limit is 2048 bytes",
            "type": "invalid_request_error",
            "param": None,
            "code": "body_too_large",
        }
    }
    assert server.recorder.requests == []


@ways
def test_refusal_is_counted_once_and_logged_without_text(
    server: Server, caplog: pytest.LogCaptureFixture, chunked: bool
) -> None:
    before = value("steering_rejected_total", code="body_too_large")
    body = json.dumps({"prompt": SECRET * LIMIT}).encode()
    with caplog.at_level("INFO", logger="vllm.sae.server"):
        post(server, "/v1/completions", body, chunked)
    assert value("steering_rejected_total", code="body_too_large") == before + 1
    ours = [record for record in caplog.records if record.name == "vllm.sae.server"]
    assert [r.getMessage() for r in ours] == ["refused '/v1/completions': body_too_large"]
    assert SECRET not in caplog.text


@given(cuts=st.lists(st.binary(max_size=40), max_size=8), limit=st.integers(0, 200))
async def test_whatever_way_a_body_is_cut_its_bytes_decide(cuts: list[bytes], limit: int) -> None:
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        body = await Request(scope, receive).body()
        await PlainTextResponse(body)(scope, receive, send)

    wire = Wire("/v1/completions", [*cuts, b""], complete=True)
    await wire.ask(limited(echo, limit))
    whole = b"".join(cuts)
    if len(whole) <= limit:
        assert (wire.statuses, wire.text) == ([200], whole)
    else:
        assert wire.statuses == [413]


# What is read of it


@ways
async def test_key_is_asked_for_before_the_size(guarded: Server, chunked: bool) -> None:
    app = guarded.client.app
    head: Any = {} if chunked else {"content_length": str(LIMIT + 1)}
    stranger = Wire("/v1/completions", [b" " * 500] * 9, **head)
    await stranger.ask(app)
    assert (stranger.statuses, stranger.left) == ([401], 9)
    client = Wire("/v1/completions", [b" " * 500] * 9, authorization="Bearer sesame", **head)
    await client.ask(app)
    assert client.statuses == [413]


async def test_body_that_states_too_much_is_not_read(server: Server) -> None:
    wire = Wire("/v1/completions", [b" " * 500] * 9, content_length=str(LIMIT + 1))
    await wire.ask(server.client.app)
    assert (wire.statuses, wire.left) == ([413], 9)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/saes/a/inspect"])
async def test_body_is_read_no_further_than_the_limit(server: Server, path: str) -> None:
    wire = Wire(path, [b" " * 500] * 9)
    await wire.ask(server.client.app)
    assert wire.left == 9 - 5  # the fifth chunk passes 2,048 bytes


@pytest.mark.parametrize("stated", ["", "many", "-5", "1e9", "9" * 5000])
async def test_length_that_is_no_number_is_not_believed(server: Server, stated: str) -> None:
    wire = Wire("/v1/completions", [b" " * 500] * 9, content_length=stated)
    await wire.ask(server.client.app)
    assert (wire.statuses, wire.left) == ([413], 4)


# Nothing is sent twice


@paths
async def test_refusal_in_the_middle_of_a_body_is_one_whole_response(
    server: Server, path: str
) -> None:
    wire = Wire(path, [b" " * 500] * 9)
    await wire.ask(server.client.app)
    assert wire.statuses == [413]
    assert [m.get("more_body", False) for m in wire.sent[1:]] == [False]
    assert json.loads(wire.text)["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
async def test_client_that_leaves_before_it_is_refused_ends_quietly(
    server: Server, path: str
) -> None:
    wire = Wire(path, [b" " * 500] * 9)
    wire.broken = True
    await wire.ask(server.client.app)
    assert wire.sent == []


async def test_client_that_leaves_below_the_limit_is_refused_nothing(server: Server) -> None:
    before = value("steering_rejected_total", code="body_too_large")
    wire = Wire("/v1/completions", [b" " * 500] * 4)
    await wire.ask(server.client.app)
    assert 413 not in wire.statuses
    assert value("steering_rejected_total", code="body_too_large") == before


async def test_response_that_has_begun_goes_on() -> None:
    async def reads_late(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.body", "body": b"all of it"})

    wire = Wire("/v1/completions", [b" " * 500] * 9)
    await wire.ask(limited(reads_late))
    assert (wire.statuses, wire.text, wire.left) == ([200], b"all of it", 4)


async def test_route_that_a_refusal_cut_off_is_no_error_and_its_client_leaving_still_is() -> None:
    async def reads_all(scope: Any, receive: Any, send: Any) -> None:
        await Request(scope, receive).body()

    await Wire("/", [b" " * 500] * 9).ask(limited(reads_all))
    with pytest.raises(ClientDisconnect):
        await Wire("/", [b" " * 500]).ask(limited(reads_all))


async def test_after_a_refusal_there_is_nothing_left_to_receive() -> None:
    seen: list[str] = []

    async def keeps_asking(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([(await receive())["type"] for _ in range(7)])
        await PlainTextResponse("late")(scope, receive, send)

    wire = Wire("/", [b" " * 500] * 9)
    await wire.ask(limited(keeps_asking))
    assert seen == ["http.request"] * 4 + ["http.disconnect"] * 3
    assert (wire.statuses, wire.left) == ([413], 4)


# What is left alone


@ways
def test_without_saes_the_server_reads_what_plain_vllm_reads(
    start: StartServer, chunked: bool
) -> None:
    server = start(saes={}, max_body_bytes=LIMIT)
    path = "/v1/completions"
    assert post(server, path, padded(path, 3 * LIMIT), chunked).status_code == 200


def test_limit_is_64_mebibytes_unless_told(start: StartServer) -> None:
    server = start()
    for stated, status in ((64 * 2**20, 200), (64 * 2**20 + 1, 413)):
        response = post(
            server,
            "/v1/completions",
            padded("/v1/completions", 100),
            chunked=False,
            **{"content-length": str(stated)},
        )
        assert response.status_code == status


async def test_what_is_not_http_passes() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    for kind in ("websocket", "lifespan"):
        await BodyLimit(app)({"type": kind}, Wire("/", []).receive, Wire("/", []).send)
    assert seen == ["websocket", "lifespan"]
