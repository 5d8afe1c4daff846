"""What is wrong with the answer to a fuzzed request."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import httpx

from steering.errors import SteeringError
from steering.request.catalog import Catalog
from tests.engine.fuzz_grammar import Shot

#: The contract's error table.
CODES: Final = frozenset(
    {
        *("steering_unavailable", "unknown_sae", "sae_required", "feature_out_of_range"),
        *("invalid_type", "invalid_value", "unknown_field", "duplicate_intervention"),
        *("max_act_unknown", "too_many_interventions", "unsupported_op"),
        *("unsupported_combination", "invalid_weights", "misplaced_steering"),
    }
)
ROUTES: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
MAX_MESSAGE: Final = 400
#: Seconds that any answer may take, on a machine that is busy with eight of them.
TIMEOUT: Final = 60.0
#: Parsers give up between the two: how deep depends on the stack below them.
SURELY_READABLE_DEPTH: Final = 300


@dataclass(frozen=True)
class Answer:
    """What came back, and the code of a refusal; None where there is none."""

    status: int
    content_type: str
    text: str

    @classmethod
    def of(cls, response: httpx.Response) -> Answer:
        kind = response.headers.get("content-type", "").partition(";")[0]
        return cls(response.status_code, kind, response.content.decode("utf-8", "replace"))

    @property
    def error(self) -> dict[str, Any]:
        """The `error` object of a refusal, empty where there is none."""
        try:
            body = json.loads(self.text)
        except ValueError:
            return {}
        error = body.get("error") if isinstance(body, dict) else None
        return error if isinstance(error, dict) else {}

    @property
    def code(self) -> str | None:
        """The code of the contract's error table, if it is one of that table."""
        code = self.error.get("code")
        return code if isinstance(code, str) and code in CODES else None

    def events(self) -> Iterable[Any]:
        """The objects of a stream."""
        for line in self.text.split("\n"):  # splitlines would part texts at U+2028 and the like
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


#: Routes whose whole body is this project's, and may be refused as a whole.
_OWN_BODIES: Final = ("/inspect", "/contrast", "/rank", "/attribute")


def ask(client: httpx.Client, shot: Shot) -> Answer:
    """Send one request. Raises httpx.HTTPError where no answer comes in time."""
    return Answer.of(
        client.request(
            shot.method,
            shot.path,
            content=shot.content,
            headers=dict(shot.headers),
            timeout=TIMEOUT,
        )
    )


def complaint(shot: Shot, answer: Answer, catalog: Catalog) -> str | None:
    """Why this answer is wrong; None where it is right."""
    if answer.status >= 500:
        return f"status {answer.status}"
    if answer.code is not None and (fault := _misshaped(shot, answer)):
        return fault
    if shot.refused_with is not None:
        if (answer.status, answer.code) == (400, shot.refused_with):
            return None
        return f"expected a refusal with {shot.refused_with}"
    if answer.status == 200 and (fault := _broken_stream(answer)):
        return fault
    return _misjudged(shot, answer, catalog) if shot.path in ROUTES else None


def _misshaped(shot: Shot, answer: Answer) -> str | None:
    """A refusal that is not as the contract says."""
    body = json.loads(answer.text)
    error = answer.error
    expected = {"error", "type"} if shot.path.startswith("/v1/messages") else {"error"}
    param = error.get("param")
    message = error.get("message")
    unreadable = error.get("code") == "invalid_value" and param is None
    faults = {
        "its status is not 400 or 404": answer.status not in (400, 404),
        "it is not JSON": answer.content_type != "application/json",
        f"keys beside {expected}": body.keys() != expected,
        "keys of the error": error.keys() != {"message", "type", "param", "code"},
        "its type": error.get("type") != "invalid_request_error",
        "its param": not (isinstance(param, str) or unreadable or shot.path.endswith(_OWN_BODIES)),
        "its message": not (isinstance(message, str) and 0 < len(message) <= MAX_MESSAGE),
        "a message of several lines": isinstance(message, str) and "\n" in message,
    }
    found = [name for name, wrong in faults.items() if wrong]
    return f"a refusal is misshaped: {', '.join(found)}" if found else None


def _broken_stream(answer: Answer) -> str | None:
    """An error after the status has been sent, or an unfinished stream."""
    if answer.content_type != "text/event-stream":
        return None
    for event in answer.events():
        if event.get("error") or event.get("type") in ("error", "response.failed"):
            return f"an error in the stream: {json.dumps(event)[:200]}"
    ends = ("[DONE]", "response.completed", "response.incomplete", "message_stop")
    return None if any(end in answer.text for end in ends) else "the stream has no end"


def _misjudged(shot: Shot, answer: Answer, catalog: Catalog) -> str | None:
    """Another answer than the one that `steering` deserves.

    Where anything else of the request may be wrong too, it may be refused for that; but no answer
    may be given that `steering` does not allow.
    """
    try:
        body = json.loads(shot.content)
    except (ValueError, RecursionError):
        unread = shot.judged and answer.status != 400
        return "a body that cannot be read was not refused" if unread else None
    if not isinstance(body, dict) or not (shot.judged or answer.status == 200):
        return None
    expected, told = _deserved(body.get("steering"), catalog)
    if expected is not None:
        got = (answer.code, answer.error.get("param"))
        if got == expected or _too_deep(shot, answer):
            return None
        return f"expected {expected}, got {answer.status} {got}"
    if answer.status != 200:
        if _too_deep(shot, answer):
            return None
        return f"expected an answer, got {answer.status}: {answer.text[:300]}"
    if ('"steering":' in answer.text) != told:
        return f"expected {'a' if told else 'no'} `steering` in the answer"
    return None


def _deserved(steering: object, catalog: Catalog) -> tuple[tuple[str, str | None] | None, bool]:
    """Code and path of the refusal, if any; else whether the answer has a `steering` of its own."""
    if steering is None:
        return None, False
    try:
        spec = catalog.parse(steering)
    except SteeringError as error:
        return (error.code, error.param), False
    return None, spec.report or spec.read is not None


def _too_deep(shot: Shot, answer: Answer) -> bool:
    """Whether the server found a body too deep that could just be read here."""
    deep = _depth(shot.content) > SURELY_READABLE_DEPTH
    return deep and (answer.status, answer.code) == (400, "invalid_value")


def _depth(content: bytes) -> int:
    """How many brackets are open at once; those inside strings count too."""
    depth = deepest = 0
    for byte in content if len(content) < 300_000 else b"":
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest
