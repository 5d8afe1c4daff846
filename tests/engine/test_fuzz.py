"""A short fuzz of a real server; `python -m tests.engine.fuzz_run` is the long one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import HealthCheck, given, settings

from sae.source import ResolvedSAE
from steering.config import SteeringConfig
from steering.request.catalog import Catalog
from tests.demo_sae import ELVES
from tests.engine.fuzz_grammar import JSON_HEADERS, Grammar, Shot, examples
from tests.engine.fuzz_openapi import openapi_shots, operations
from tests.engine.fuzz_verdict import ROUTES, ask, complaint

if TYPE_CHECKING:
    from tests.engine.server import LiveServer

pytest_plugins = ("tests.engine.server",)
pytestmark = pytest.mark.timeout(600)

MODEL: Final = "smollm2"
D_MODEL, NUM_LAYERS = 576, 30
PARIS: Final = "What is the capital of France?"
GRAMMAR: Final = Grammar(
    MODEL, {"l14": 4608, "second": 64, "twin": 64}, [PARIS, "The snow fell", "x\n"]
)
STEERED: Final = {"interventions": [{"sae": "l14", "feature": ELVES, "op": "clamp", "value": 40}]}
FROM_GRAMMAR: Final = 200
FROM_OPENAPI: Final = 8


@pytest.fixture(scope="module")
def catalog(live_server: LiveServer) -> Catalog:
    """The server's SAEs, opened here: what `steering` deserves is judged by the same files."""
    references = tuple(
        ResolvedSAE(name, str(path), path=str(path)) for name, path in live_server.saes.items()
    )
    return Catalog.from_config(SteeringConfig(references, D_MODEL, NUM_LAYERS))


@pytest.fixture(scope="module")
def before(live_server: LiveServer) -> list[list[int]]:
    """What an unsteered and a steered request are answered."""
    return [live_server.tokens(PARIS, steering) for steering in (None, STEERED)]


@pytest.fixture(autouse=True)
def canary(live_server: LiveServer, before: list[list[int]]) -> Iterator[None]:
    """They are answered as before, whatever came between."""
    yield
    assert [live_server.tokens(PARIS, steering) for steering in (None, STEERED)] == before


def judge(live_server: LiveServer, catalog: Catalog, shot: Shot) -> int:
    """The status of an answer that is right."""
    answer = ask(live_server.client, shot)
    assert complaint(shot, answer, catalog) is None, answer.text[:500]
    return answer.status


def test_whatever_is_sent_the_answer_is_what_the_contract_says(
    live_server: LiveServer, catalog: Catalog
) -> None:
    answered: Counter[tuple[str, int]] = Counter()

    # The same examples on every run; the long run draws others.
    @settings(
        max_examples=FROM_GRAMMAR,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(shot=GRAMMAR.shots())
    def fire(shot: Shot) -> None:
        answered[shot.part, judge(live_server, catalog, shot)] += 1

    fire()
    assert answered["valid", 200] > 10 and answered["nearly", 400] > 10


def test_requests_drawn_from_the_servers_own_schema_are_answered_or_refused(
    live_server: LiveServer, catalog: Catalog
) -> None:
    schema = live_server.client.get("/openapi.json").json()
    routes = operations(schema)
    assert {path for path, _ in routes} > set(ROUTES)
    for path, method in routes:
        shots = openapi_shots(schema, path, method, MODEL, list(live_server.saes))
        for shot in examples(shots, FROM_OPENAPI, first_seed=1):
            judge(live_server, catalog, shot)


COMPLETION: Final = f'{{"model":"{MODEL}","prompt":"x","max_tokens":2,'
ABLATE: Final = '{"interventions":[{"sae":"l14","feature":1,"op":"ablate"}],"report":true}'

#: What fuzzing found, or what it would rarely draw: the rest of a completion's body, and the code
#: of the refusal; None where it is answered.
KEPT: Final[dict[str, tuple[str, str | None]]] = {
    # Was dropped without a word, and the answer came unsteered.
    "the engine's plan, smuggled": (
        '"vllm_xargs":{"steering_plan":"x"}}',
        "unsupported_combination",
    ),
    "a key spelled in escapes": (f'"\\u0073teer\\u0069ng":{ABLATE}}}', None),
    "steering twice, the last right": (f'"steering":7,"steering":{ABLATE}}}', None),
    "steering twice, the last wrong": (f'"steering":{ABLATE},"steering":7}}', "invalid_type"),
    "half a surrogate as the name": (
        '"steering":{"interventions":[{"sae":"\\ud800","feature":1,"op":"ablate"}]}}',
        "unknown_sae",
    ),
    "deeper than a parser goes": (f'"steering":{"[" * 99_999}{"]" * 99_999}}}', "invalid_value"),
    "a number of 5000 digits": (f'"steering":{{"report":{"9" * 5000}}}}}', "invalid_value"),
    "a number of 4000 digits": (f'"steering":{{"report":{"9" * 4000}}}}}', "invalid_type"),
    "a million edits": (
        f'"steering":{{"interventions":[{"{}," * 999_999}{{}}]}}}}',
        "too_many_interventions",
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_fuzzing_found_stays_as_it_should_be(
    live_server: LiveServer, catalog: Catalog, case: str
) -> None:
    rest, code = KEPT[case]
    content = (COMPLETION + rest).encode()
    shot = Shot("kept", "/v1/completions", content, headers=JSON_HEADERS, refused_with=code)
    answer = ask(live_server.client, shot)
    if code is not None:
        assert (answer.status, answer.code) == (400, code), answer.text[:500]
        assert complaint(shot, answer, catalog) is None
    else:
        assert answer.status == 200
        (entry,) = json.loads(answer.text)["steering"]["interventions"]
        assert entry["feature"] == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-be"])
def test_other_encodings_of_json_are_steered_or_refused_as_utf_8_is(
    live_server: LiveServer, encoding: str
) -> None:
    for path, status in (("/v1/completions", 200), ("/tokenize", 400)):
        content = f'{COMPLETION}"steering":{ABLATE}}}'.encode(encoding)
        answer = ask(live_server.client, Shot("kept", path, content))
        assert answer.status == status
        assert '"steering' in answer.text
