"""The self-check in the background: whatever happens to it, the server goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import State
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.v1.engine.exceptions import EngineDeadError

from sae.self_check import TEXT, Measured
from sae.source import ResolvedSAE
from server import self_check
from server.plugin import SteeringEndpointPlugin
from steering.config import SteeringConfig
from steering.report import Summary
from steering.request.catalog import SCAN_LIMIT_BYTES
from steering.request.plan import SteeringPlan
from steering.vllm.plugin import register
from steering.vllm.reader import LAST
from tests.models import D_MODEL, NUM_LAYERS
from tests.server.fakes import FakeEngine, serve_args

References = Callable[..., tuple[ResolvedSAE, ...]]


class CheckedEngine(FakeEngine):
    """An engine that measures the same of every SAE, or fails at it."""

    def __init__(self, *saes: ResolvedSAE, rank: int = 0, max_model_len: int = 512) -> None:
        super().__init__(SteeringConfig(saes, D_MODEL, NUM_LAYERS) if saes else None)
        self.vllm_config.parallel_config = SimpleNamespace(
            _api_process_rank=rank, pipeline_parallel_size=1
        )
        self.vllm_config.model_config = SimpleNamespace(
            max_model_len=max_model_len, model="some/model"
        )
        self.measured = Measured(100, 0, 8.0, 0.9)
        self.error: BaseException | None = None
        self.output_processor = self
        self.busy_looks = 0  # how often somebody else's request is found in the engine

    def has_unfinished_requests(self) -> bool:
        self.busy_looks -= 1
        return self.busy_looks >= 0

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(encode=lambda text: list(text.encode()), decode=str)

    async def add_request(self, *args: Any, **options: Any) -> Any:
        collector = await super().add_request(*args, **options)
        if self.error is not None:
            raise self.error
        return collector

    def summary(self, plan: SteeringPlan, child: int) -> Summary:
        return Summary(child, measured=asdict(self.measured))

    @property
    def saes_asked(self) -> list[str]:
        return [params.extra_args["steering"].spec.read.sae for params in self.params]


@pytest.fixture(autouse=True)
def logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """What the server's logger says; whether vLLM hands it on to pytest depends on its set-up."""
    register()  # reports come to whoever asked through what it puts around the engine
    monkeypatch.setattr(self_check.logger, "propagate", False)
    self_check.logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, self_check.logger.name)
    yield caplog
    self_check.logger.removeHandler(caplog.handler)


def test_each_sae_gets_a_line(references: References, logged: pytest.LogCaptureFixture) -> None:
    engine = CheckedEngine(*references(a={}, b={"layer": 2}))
    asyncio.run(self_check.check_all(engine))
    assert engine.saes_asked == ["a", "b"]
    lines = [record.getMessage() for record in logged.records]
    assert [line.split(":")[1] for line in lines] == [
        " SAE 'a' at blocks.1.hook_resid_post",
        " SAE 'b' at blocks.2.hook_resid_post",
    ]
    assert [record.levelno for record in logged.records] == [logging.INFO] * 2


def test_misfit_is_a_warning(references: References, logged: pytest.LogCaptureFixture) -> None:
    engine = CheckedEngine(*references(a={}))
    engine.measured = Measured(100, 0, 8.0, -2.0)
    asyncio.run(self_check.check_all(engine))
    (record,) = logged.records
    assert record.levelno == logging.WARNING
    assert "likely the wrong layer" in record.getMessage()


def test_request_comes_last_shares_no_block_and_fits_the_model(references: References) -> None:
    engine = CheckedEngine(*references(a={}), max_model_len=64)
    asyncio.run(self_check.check_all(engine))
    (prompt,), (params,), (priority,) = engine.prompts, engine.params, engine.priorities
    assert prompt["prompt_token_ids"] == list(TEXT.encode())[:63]
    assert prompt["cache_salt"] == self_check.CACHE_SALT
    assert priority == LAST
    assert params.max_tokens == 1


def test_clients_come_first_within_limits(
    references: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "LOOK_EVERY", 0.0)
    engine = CheckedEngine(*references(a={}))
    engine.busy_looks = 3
    asyncio.run(self_check.check_all(engine))
    assert engine.busy_looks == -1
    monkeypatch.setattr(self_check, "PATIENCE", 0.0)
    engine.busy_looks = 10**9
    asyncio.run(self_check.check_all(engine))
    assert engine.saes_asked == ["a", "a"]


def test_failure_of_one_is_a_line_and_the_next_is_checked(
    references: References, logged: pytest.LogCaptureFixture
) -> None:
    engine = CheckedEngine(*references(a={}, b={}))
    engine.error = RuntimeError("out of\n  memory")
    asyncio.run(self_check.check_all(engine))
    assert [record.getMessage() for record in logged.records] == [
        "SAE 'a': the self-check failed: out of memory",
        "SAE 'b': the self-check failed: out of memory",
    ]
    assert all(record.exc_info is None for record in logged.records)


def test_dead_engine_ends_it_without_a_word(
    references: References, logged: pytest.LogCaptureFixture
) -> None:
    engine = CheckedEngine(*references(a={}, b={}))
    engine.error = EngineDeadError()
    asyncio.run(self_check.check_all(engine))
    assert engine.saes_asked == ["a"]
    assert logged.records == []


def test_shutdown_cancels_it_without_a_word(
    references: References, logged: pytest.LogCaptureFixture
) -> None:
    engine = CheckedEngine(*references(a={}))

    async def never(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        await asyncio.Event().wait()
        yield None

    engine.generate = never  # type: ignore[method-assign]

    async def run() -> None:
        self_check.start(engine, max_bytes=None)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert self_check._running == set()
    assert logged.records == []


def test_no_more_weights_are_read_than_allowed(
    references: References, logged: pytest.LogCaptureFixture
) -> None:
    small, large = {"d_sae": 64}, {"d_sae": 4096}
    engine = CheckedEngine(*references(a=small, b=large, c=small, d=large))
    asyncio.run(self_check.check_all(engine, max_bytes=200_000))
    assert engine.saes_asked == ["a", "c"]
    assert logged.records[-1].getMessage().startswith("self-check: left out 'b', 'd', to read no")
    engine.params.clear()
    asyncio.run(self_check.check_all(engine))
    assert engine.saes_asked == ["a", "b", "c", "d"]


def test_only_the_first_api_server_of_several_checks(references: References) -> None:
    async def run(rank: int) -> CheckedEngine:
        engine = CheckedEngine(*references(a={}), rank=rank)
        self_check.start(engine, max_bytes=None)
        await asyncio.gather(*self_check._running)
        return engine

    assert asyncio.run(run(0)).saes_asked == ["a"]
    assert asyncio.run(run(1)).saes_asked == []


@pytest.mark.parametrize(
    ("saes", "flag", "limit"),
    [
        (1, None, SCAN_LIMIT_BYTES),
        (1, True, None),
        (1, False, "not started"),
        (0, None, "not started"),
        (0, True, "not started"),
    ],
)
def test_flag_and_saes_say_whether_it_starts(
    references: References,
    monkeypatch: pytest.MonkeyPatch,
    saes: int,
    flag: bool | None,
    limit: object,
) -> None:
    started: list[object] = []
    monkeypatch.setattr(self_check, "start", lambda engine, max_bytes: started.append(max_bytes))
    engine = CheckedEngine(*references(**{name: {} for name in "abc"[:saes]}))
    args = serve_args()
    args.steering_self_check = flag
    state = State()
    state.openai_serving_models = OpenAIServingModels(engine, [BaseModelPath("m", "/nowhere")])
    asyncio.run(SteeringEndpointPlugin().init_state(engine, state, args))
    assert started == ([] if limit == "not started" else [limit])
