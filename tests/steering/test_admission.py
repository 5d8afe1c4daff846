"""What the door in front of the engine refuses for its size, and that it does so in time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sae.source import ResolvedSAE
from steering.config import LEAST_MAX_READ_VALUES, SteeringConfig
from steering.errors import SteeringError
from steering.report import Ticket
from steering.request.accepted import Accepted, accept
from steering.request.catalog import Catalog
from steering.request.plan import Inspection
from steering.vllm.door import (
    MAX_REPORT_VALUES,
    catalog_for,
    complete,
    plan_of,
)
from steering.vllm.plugin import _collecting, _validating
from tests.models import D_MODEL, NUM_LAYERS, make_tiny_sae

PROMPT_LEN = 10
#: 30 positions with the prompt's, 7 features each.
READ = {"read": {"top_k": 7}}
MAX_TOKENS = 20
CONTEXT = 100_000
VALUES = 210
REPORT = {"interventions": [{"feature": 1, "op": "ablate"}], "report": True}


def params(field: Any, *, n: int = 1, max_tokens: int | None = MAX_TOKENS) -> Any:
    """A request's parameters, as far as steering looks at them."""
    extra_args = {"steering": field}
    return SimpleNamespace(extra_args=extra_args, n=n, max_tokens=max_tokens, output_kind=None)


def request(sampling_params: Any) -> Any:
    return SimpleNamespace(
        request_id="1",
        sampling_params=sampling_params,
        prompt_token_ids=[5] * PROMPT_LEN,
        prompt_embeds=None,
        resumable=False,
        cache_salt=None,
    )


Engine = Callable[[int | None], Any]


@pytest.fixture
def config(tmp_path: Path) -> Engine:
    """A `VllmConfig` whose steering has this limit."""
    path = make_tiny_sae(tmp_path / "a")
    saes = (ResolvedSAE("a", str(path), path=str(path)),)

    def make(max_read_values: int | None) -> Any:
        steering = SteeringConfig(saes, D_MODEL, NUM_LAYERS, max_read_values=max_read_values)
        return SimpleNamespace(
            additional_config={"steering": steering.to_dict()},
            model_config=SimpleNamespace(max_model_len=CONTEXT),
            parallel_config=SimpleNamespace(pipeline_parallel_size=1),
            speculative_config=None,
        )

    return make


def catalog(vllm_config: Any) -> Catalog:
    return Catalog.from_config(SteeringConfig.from_additional_config(vllm_config.additional_config))


@pytest.mark.parametrize(
    ("field", "more", "values"),
    [
        (READ, {}, VALUES),
        (READ, {"n": 3}, 3 * VALUES),
        ({"read": {}}, {}, 30 * 5),
        ({**READ, "positions": {"generation": False}}, {}, 10 * 7),
        ({**READ, "positions": {"prompt": False}}, {}, 20 * 7),
        ({**READ, "positions": {"start": 4, "end": 25}}, {}, 21 * 7),
        ({**READ, "positions": {"start": 12}}, {"n": 2}, 18 * 7 * 2),
    ],
    ids=["both phases", "n", "top_k left out", "prompt", "generation", "window", "open window"],
)
def test_read_of_as_many_values_as_the_limit_is_admitted_and_one_more_is_not(
    config: Engine, field: Any, more: dict[str, int], values: int
) -> None:
    admitted = request(params(field, **more))
    complete(admitted, catalog(config(values)))
    assert plan_of(admitted.sampling_params) is not None
    with pytest.raises(ValueError) as refused:
        complete(request(params(field, **more)), catalog(config(values - 1)))
    assert isinstance(refused.value, SteeringError)
    assert (refused.value.code, refused.value.param) == ("invalid_value", "steering.read")


def test_refusal_gives_the_number_the_limit_and_a_remedy(config: Engine) -> None:
    with pytest.raises(SteeringError) as refused:
        complete(request(params(READ, n=2)), catalog(config(400)))
    assert refused.value.message == (
        "a read of 7 features of up to 30 tokens in 2 choices is 420 values, the limit is 400: "
        "lower max_tokens, top_k or n, or narrow positions with start and end"
    )


def test_only_what_is_read_counts(config: Engine) -> None:
    complete(request(params(REPORT, n=8, max_tokens=CONTEXT)), catalog(config(64)))


def test_one_choice_may_read_all_that_a_context_has_unless_told(config: Engine) -> None:
    assert Catalog({}).max_read_values == LEAST_MAX_READ_VALUES == 4194304
    assert catalog_for(config(None)).max_read_values == 64 * CONTEXT
    assert catalog_for(config(2**22)).max_read_values == 2**22
    wide = {"read": {"top_k": 64}}
    complete(request(params(wide, max_tokens=CONTEXT - PROMPT_LEN)), catalog_for(config(None)))
    with pytest.raises(SteeringError):
        complete(request(params(wide, max_tokens=CONTEXT)), catalog_for(config(None)))


def test_report_of_more_activations_than_are_kept_is_refused(config: Engine) -> None:
    fits = MAX_REPORT_VALUES // 2 - PROMPT_LEN
    complete(request(params(REPORT, n=2, max_tokens=fits)), catalog(config(64)))
    with pytest.raises(SteeringError, match="lower max_tokens or n") as refused:
        complete(request(params(REPORT, n=2, max_tokens=fits + 1)), catalog(config(64)))
    assert (refused.value.code, refused.value.param) == ("invalid_value", "steering.report")
    # The only choice of a request is never refused for its length.
    complete(request(params(REPORT, max_tokens=2 * fits)), catalog(config(64)))


def test_what_has_a_ticket_is_awaited(config: Engine) -> None:
    saes = catalog(config(64))
    accepted = accept(REPORT, saes)
    for field, awaited in ((accepted, False), (accepted.reporting_to(Ticket(True)), True)):
        admitted = request(params(field))
        complete(admitted, saes)
        plan = plan_of(admitted.sampling_params)
        assert plan is not None
        assert plan.awaited is awaited


def test_inspection_is_counted_and_a_self_check_is_not(config: Engine) -> None:
    field = {**READ, "positions": {"generation": False}}

    def inspected(vllm_config: Any, aggregate: str | None) -> Any:
        saes = catalog(vllm_config)
        return request(params(accept(field, saes, Inspection(aggregate, True)))), saes

    complete(*inspected(config(70), "max"))
    with pytest.raises(SteeringError, match="lower top_k, or send less text") as refused:
        complete(*inspected(config(69), "max"))
    assert refused.value.param == "top_k"
    complete(*inspected(config(64), None))


def test_of_a_whole_text_that_is_the_prompt_a_part_may_count_as_generation(config: Engine) -> None:
    field = {
        "interventions": [{"feature": 1, "op": "ablate"}],
        "positions": {"prompt": False},
    }
    saes = catalog(config(64))
    plans, salts = [], []
    for accepted in (accept(field, saes), replace(accept(field, saes), prompt_len=4)):
        admitted = request(params(accepted))
        complete(admitted, saes)
        plans.append(plan_of(admitted.sampling_params))
        salts.append(admitted.cache_salt)
    assert [plan.prompt_len for plan in plans if plan is not None] == [PROMPT_LEN, 4]
    # The same tokens, but edited from another one on.
    assert len(set(salts)) == 2


def test_values_of_a_read_are_counted_from_where_generation_begins(config: Engine) -> None:
    saes = catalog(config(64))
    read = {"read": {"top_k": 20}}
    for field, values in (
        ({**read, "positions": {"prompt": False}}, (30 - 4) * 20),
        ({**read, "positions": {"generation": False}}, 4 * 20),
    ):
        accepted = replace(accept(field, saes), prompt_len=4)
        complete(request(params(accepted)), catalog(config(values)))
        with pytest.raises(SteeringError):
            complete(request(params(accepted)), catalog(config(values - 1)))


def test_what_was_accepted_stays_one_object_and_does_not_go_on_to_the_engine(
    config: Engine,
) -> None:
    saes = catalog(config(VALUES))
    accepted = accept(READ, saes)
    assert copy.deepcopy({"steering": accepted})["steering"] is accepted
    admitted = request(params(accepted))
    assert complete(admitted, saes) is accepted
    assert admitted.sampling_params.extra_args.keys() == {"steering_plan"}
    assert msgspec.msgpack.encode(admitted.sampling_params.extra_args)


def test_parameters_that_a_caller_uses_again_are_not_changed(config: Engine) -> None:
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config(VALUES)))
    given = params(READ)
    handed: list[Any] = []
    add = _validating(lambda self, prompts, params: handed.extend(params))
    add(llm, prompts=[rendered(), rendered()], params=[given, given])
    assert given.extra_args == {"steering": READ}
    assert isinstance(handed[0].extra_args["steering"], Accepted)
    assert handed[0] is handed[1]


# In time


class Started(Exception):
    """The engine was asked to begin."""


def begin(*args: Any, **kwargs: Any) -> Any:
    raise Started


def rendered(length: int = PROMPT_LEN) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": [5] * length}


def test_engine_that_streams_is_not_called_for_a_read_that_is_too_long(config: Engine) -> None:
    generate = _collecting(begin)

    def ticketed(field: Any) -> Any:
        return params(accept(field, catalog(config(None))).reporting_to(Ticket(True)))

    with pytest.raises(SteeringError, match="the limit is 209"):
        generate(SimpleNamespace(vllm_config=config(VALUES - 1)), rendered(), ticketed(READ), "1")
    with pytest.raises(Started):
        generate(SimpleNamespace(vllm_config=config(VALUES)), rendered(), ticketed(READ), "1")


def test_engine_that_streams_refuses_an_invalid_field_as_a_value_error(config: Engine) -> None:
    engine = SimpleNamespace(vllm_config=config(64))
    with pytest.raises(ValueError, match="interventions"):
        _collecting(begin)(engine, "text", params({"interventions": []}), "1")
    with pytest.raises(Started):
        _collecting(begin)(engine, "text", params(REPORT), "1")


def test_edits_that_meet_in_this_prompt_are_refused_before_anything_runs(config: Engine) -> None:
    # Of one feature: the first three tokens, and the last four.
    windows: tuple[Any, ...] = ({"end": 3}, {"start": -4, "generation": False})
    edits = [{"feature": 1, "op": "ablate", "positions": where} for where in windows]
    engine = SimpleNamespace(vllm_config=config(None))
    for length, meets in ((7, False), (6, True)):
        expected: Any = SteeringError if meets else Started
        with pytest.raises(expected):
            _collecting(begin)(engine, rendered(length), params({"interventions": edits}), "1")


@pytest.mark.parametrize("prompt", ["text", {"prompt": "text"}])
def test_prompt_whose_length_is_not_known_yet_is_left_to_the_door(
    config: Engine, prompt: Any
) -> None:
    engine = SimpleNamespace(vllm_config=config(64))

    def ticketed(field: Any, **more: Any) -> Any:
        accepted = accept(field, catalog(config(64)))
        return params(accepted.reporting_to(Ticket(True)), **more)

    with pytest.raises(Started):
        _collecting(begin)(engine, prompt, ticketed(READ), "1")
    with pytest.raises(Started):
        unset = ticketed(READ, max_tokens=None)
        _collecting(begin)(engine, rendered(), unset, "1")


def test_batch_is_refused_before_its_first_request_runs(config: Engine) -> None:
    def prompts() -> Iterator[dict[str, Any]]:
        yield from (rendered(), rendered(), rendered(PROMPT_LEN + 1))

    add = _validating(begin)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config(VALUES)))
    with pytest.raises(SteeringError, match="up to 31 tokens is 217 values"):
        add(llm, prompts=prompts(), params=[params(READ)] * 3)
    with pytest.raises(Started):
        add(llm, prompts=prompts(), params=[params(READ)] * 2 + [params(None)])


def test_batch_without_a_read_is_rendered_as_it_runs(config: Engine) -> None:
    prompts = iter([rendered()])
    edits = {"interventions": [{"feature": 1, "op": "ablate"}]}
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config(64)))
    with pytest.raises(Started):
        _validating(begin)(llm, prompts=prompts, params=[params(edits)])
    assert [*prompts] == [rendered()]


def test_condition_of_another_pipeline_stage_is_refused(tmp_path: Path) -> None:
    references = [
        ResolvedSAE(f"s{layer}", str(path), path=str(path))
        for layer in range(NUM_LAYERS)
        if (path := make_tiny_sae(tmp_path / f"s{layer}", layer=layer))
    ]
    steering = SteeringConfig(tuple(references), D_MODEL, NUM_LAYERS)

    def served(stages: int) -> Any:
        return SimpleNamespace(
            additional_config={"steering": steering.to_dict()},
            model_config=SimpleNamespace(
                max_model_len=CONTEXT, get_total_num_hidden_layers=lambda: NUM_LAYERS
            ),
            parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
            speculative_config=None,
        )

    def parse(edit: int, condition: int, stages: int) -> None:
        when = {"sae": f"s{condition}", "feature": 1, "above": 0}
        item = {"sae": f"s{edit}", "feature": 3, "op": "ablate", "when": when}
        catalog_for(served(stages)).parse({"interventions": [item]})

    # Of four layers in two stages, each has two.
    parse(1, 0, stages=2)
    parse(3, 2, stages=2)
    parse(2, 1, stages=1)
    with pytest.raises(SteeringError, match="different pipeline stages") as refused:
        parse(2, 1, stages=2)
    assert refused.value.code == "unsupported_combination"
    assert refused.value.param == "steering.interventions[0].when"
