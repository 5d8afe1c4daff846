"""A text that is read is treated, token by token, as when the model wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest

from steering.request.accepted import Accepted, accept
from steering.vllm.door import catalog_for
from steering.vllm.reader import Finished, Run, Text, run_offline
from tests.engine.engine import Engine, tiny_engine
from tests.engine.outputs import tokens
from tests.models import make_tiny_model

PROMPT = tokens(5, 20)
EDIT = {"sae": "a", "feature": 3, "op": "clamp", "value": 6}
#: The second is read behind the place of the first's edits.
SAES: Final = ({"layer": 1}, {"layer": 3, "seed": 5})
FIELDS = [
    {"interventions": [EDIT], "positions": {"prompt": False}, "report": True},
    {"interventions": [EDIT], "positions": {"generation": False}, "report": True},
    {"interventions": [{**EDIT, "positions": {"start": 4, "end": 24}}], "report": True},
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("reader")
    made = tiny_engine(make_tiny_model(folder / "llama", "llama"), folder, SAES)
    yield made
    made.shut_down()


def accepted(engine: Engine, field: dict[str, Any]) -> Accepted:
    return accept(field, catalog_for(engine.llm.llm_engine.vllm_config))


@pytest.mark.parametrize("field", FIELDS, ids=["generation", "prompt", "window"])
def test_scored_text_has_the_probabilities_and_the_report_of_its_generation(
    engine: Engine, field: dict[str, Any]
) -> None:
    (written,) = engine.generate([PROMPT], [field], max_tokens=8)
    text = Text(tuple(PROMPT), tuple(written.tokens))
    run = Run.of(text, accepted(engine, field), last_enters=False, prompt_logprobs=0, logprobs=1)
    read = run_offline(engine.llm, run)
    scored = [*read.output.prompt_logprobs[len(PROMPT) :], read.output.outputs[0].logprobs[0]]
    found = [of_one[token].logprob for token, of_one in zip(written.tokens, scored, strict=True)]
    assert found == pytest.approx(written.logprobs, abs=1e-4)
    assert read.report is not None
    (entry,), (expected,) = read.report.interventions, written.steering[0].interventions
    counts = ("tokens_edited", "tokens_skipped", "tokens_active")
    assert [entry[name] for name in counts] == [expected[name] for name in counts]
    assert entry["mean_activation"] == pytest.approx(expected["mean_activation"], abs=1e-4)


def test_phase_of_a_token_that_was_read_is_its_texts(engine: Engine) -> None:
    field = {"read": {"sae": "a", "top_k": 1}}
    read = run_offline(
        engine.llm, Run.of(Text(tuple(PROMPT), (7, 8, 9)), accepted(engine, field))
    ).report
    assert read is not None and read.read is not None
    phases = {token["position"]: token["phase"] for token in read.read["tokens"]}
    assert phases[len(PROMPT) - 1] == "prompt"
    assert phases[len(PROMPT)] == phases[len(PROMPT) + 2] == "generation"


@pytest.mark.parametrize("sense", ["above", "below"])
def test_prompt_decides_about_its_completion_wherever_it_is_read(
    engine: Engine, sense: str
) -> None:
    read = run_offline(
        engine.llm, Run.of(Text(tuple(PROMPT)), accepted(engine, {"read": {"sae": "b"}}))
    ).report
    assert read is not None and read.read is not None
    fires = read.read["tokens"][0]["features"][0][0]
    condition = {"sae": "b", "feature": fires, sense: 0, "scope": "prompt"}
    edit = {**EDIT, "positions": {"prompt": False}}
    field = {"interventions": [{**edit, "when": condition}], "report": True}
    text = Text(tuple(PROMPT), tuple(tokens(6, 10)[1:]))
    made, unconditional, unsteered = (
        run_offline(
            engine.llm,
            Run.of(
                text,
                None if wanted is None else accepted(engine, wanted),
                last_enters=False,
                prompt_logprobs=0,
            ),
        )
        for wanted in (field, {"interventions": [edit]}, None)
    )
    held = sense == "below"
    expected, other = (unsteered, unconditional)[:: 1 if held else -1]
    assert made.report is not None
    [entry] = made.report.interventions
    counts = entry["tokens_edited"], entry["tokens_held_back"]
    assert counts == ((0, 8) if held else (8, 0))
    assert _scores(made) == pytest.approx(_scores(expected), abs=1e-5)
    assert _scores(made) != pytest.approx(_scores(other), abs=1e-2)
    assert engine.scheduler._prompt_ends == {}


def _scores(run: Finished) -> list[float]:
    """Log-probabilities of a text's tokens but for the first."""
    ids = run.output.prompt_token_ids
    entries = zip(ids[1:], run.output.prompt_logprobs[1:], strict=True)
    return [entry[token].logprob for token, entry in entries]


def test_text_that_differs_only_in_where_generation_begins_shares_no_block(
    engine: Engine,
) -> None:
    field = FIELDS[0]
    alone = {
        split: run_offline(engine.llm, _scored(engine, field, split)).output.prompt_logprobs
        for split in (8, 16)
    }
    assert alone[8][12:] != alone[16][12:]
    # In the other order, so that each finds the other's blocks if it could.
    for split in (16, 8):
        again = run_offline(engine.llm, _scored(engine, field, split)).output.prompt_logprobs
        assert again == alone[split]


def _scored(engine: Engine, field: dict[str, Any], split: int) -> Run:
    ids = tuple(tokens(9, 40))
    text = Text(ids[:split], ids[split:])
    return Run.of(text, accepted(engine, field), prompt_logprobs=0)
