"""Whole engines on a GPU, by how they use CUDA graphs, against transformers with hooks.

Each engine is a process of its own, which answers the requests of `battery.py` in batches of
several sizes. One that does not start takes its own tests with it and no others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from steering.vllm.piecewise import STEER
from tests.gpu.battery import AT_ONCE, CAPTURED, EVERY, STOP, WAVES, Battery, battery
from tests.gpu.battery import WHOLE as FIELDS_OF_WHOLE
from tests.gpu.device import REHEARSAL
from tests.gpu.watch import ROWS, WHOLE

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(2500)]

#: Nats. On CUDA vLLM's attention multiplies float32 in TF32, which rounds to 11 bits.
TOLERANCE: Final = 1e-3 if REHEARSAL else 2e-2
#: Of an activation: requests whose reference comes nearer than this to a jump are left out.
MARGIN: Final = 2e-4 if REHEARSAL else 5e-3
#: What edits must change at least, in tolerances.
EFFECT: Final = 5
#: Of each of two engines.
SECONDS: Final = 1200

ARGUMENTS: Final[dict[str, Any]] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": AT_ONCE,
    "kv_cache_memory_bytes": 64 * 2**20,
    "enable_prefix_caching": False,
}
ON_CUDA: Final[dict[str, Any]] = {"gpu_memory_utilization": 0.4}
#: A CPU has no graphs, and without a compiler's half minute each engine differs by nothing else.
ON_CPU: Final[dict[str, Any]] = {"enforce_eager": True}


def _graphs(mode: str | None = None, **more: Any) -> dict[str, Any]:
    mode_of = {} if mode is None else {"cudagraph_mode": mode}
    return {"compilation_config": {"cudagraph_capture_sizes": [*CAPTURED], **mode_of}, **more}


CONFIGURATIONS: Final[dict[str, dict[str, Any]]] = {
    "default": _graphs(),
    "piecewise": _graphs("PIECEWISE"),
    "full": _graphs("FULL"),
    "eager": {"enforce_eager": True},
    "synchronous": _graphs(async_scheduling=False),
    "two-ranks": _graphs(tensor_parallel_size=2),
}


@dataclass
class Outcome:
    """What one engine answered, and one of vLLM alone with the same arguments.

    An engine that broke has answered some waves and says ``why`` not the others.
    """

    name: str
    steered: dict[str, Any]
    plain: dict[str, Any]

    @property
    def engine(self) -> dict[str, Any]:
        """What kind of engine it was."""
        found: dict[str, Any] = self.steered["engine"]
        return found

    def answer(self, name: str, wave: str = "everything") -> dict[str, Any]:
        """Of one request in one wave."""
        found: dict[str, Any] = _known(self.steered, "waves", wave)[name]
        return found

    @property
    def scored(self) -> dict[str, list[float]]:
        """The text's KL by position."""
        found: dict[str, list[float]] = _known(self.steered, "scored")
        return found

    def graphs(self, wave: str, need: str) -> set[str]:
        """Kinds of graph that those passes of a wave took that needed this."""
        if not self.engine["runner"].startswith("vllm.v1.worker.gpu.model_runner"):
            pytest.skip("runner V1 has no dispatch to watch")
        return set(_known(self.steered, "graphs", wave)[need])


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Battery:
    return battery(tmp_path_factory.mktemp("battery"))


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def outcome(
    request: pytest.FixtureRequest, asked: Battery, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    name: str = request.param
    more = CONFIGURATIONS[name]
    ranks = more.get("tensor_parallel_size", 1)
    if not REHEARSAL and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} GPUs are needed, and here is {torch.cuda.device_count()}")
    arguments = {**ARGUMENTS, **more, **(ON_CPU if REHEARSAL else ON_CUDA)}
    folder = tmp_path_factory.mktemp(name)
    alone = {"alone": ("unsteered",)}
    return Outcome(
        name,
        answered(asked.task(WAVES, True, arguments), folder / "steered", ranks),
        answered(asked.task(alone, False, arguments), folder / "plain", ranks),
    )


def answered(task: str, path: Path, ranks: int) -> dict[str, Any]:
    """Run an engine; its log's end is the failure where it fails, of what it did not come to."""
    task_file, out = path.with_suffix(".task.json"), path.with_suffix(".json")
    task_file.write_text(task)
    in_one_process = REHEARSAL and ranks == 1
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_one_process else "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    log = path.with_suffix(".log")
    with log.open("wb") as file:
        try:
            finished = subprocess.run(
                [sys.executable, "-m", "tests.gpu.engine_run", task_file, out],
                env=environment,
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                timeout=SECONDS,
            )
            ended = f"with {finished.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"not within {SECONDS} s"
    why = f"the engine ended {ended}:\n{log.read_text(errors='replace')[-6000:]}"
    if not out.exists():
        pytest.fail(why)
    return {**json.loads(out.read_text()), "why": why}


def _known(found: dict[str, Any], *names: str) -> Any:
    """What an engine wrote under these names."""
    inner: Any = found
    for name in names:
        if name not in inner:
            pytest.fail(f"not known, since {found['why']}")
        inner = inner[name]
    return inner


@pytest.mark.parametrize("name", [name for name in EVERY if name != STOP])
def test_log_probabilities_and_report_are_those_of_transformers_with_hooks(
    outcome: Outcome, asked: Battery, name: str, record_property: Callable[[str, object], None]
) -> None:
    answer = outcome.answer(name)
    expected, clean, nearest = asked.expected(name, answer)
    difference = _largest(expected, answer["logprobs"])
    effect = _largest(expected, clean)
    record_property("nats from the reference", difference)
    record_property("nats from unsteered", effect)
    _skip_if_near(nearest)
    assert difference < TOLERANCE
    steering = asked.requests[name]["steering"]
    if steering is None or "interventions" not in steering:
        return
    assert effect > EFFECT * TOLERANCE, "the edit does nothing"
    entries = answer["steering"]["interventions"]
    assert len(entries) == len(steering["interventions"])
    assert any(entry["tokens_edited"] for entry in entries)


@pytest.mark.parametrize("name", ["read", "edit and read"])
def test_features_that_are_read_are_the_strongest_of_the_reference(
    outcome: Outcome, asked: Battery, name: str
) -> None:
    answer, read = outcome.answer(name), FIELDS_OF_WHOLE[name]["read"]
    seen = asked.seen(name, {**answer, "tokens": answer["tokens"][:-1]}, read["sae"])
    tokens = answer["steering"]["read"]["tokens"]
    assert [token["position"] for token in tokens] == list(range(1, len(seen)))
    for token in tokens:
        best = seen[token["position"]].topk(read["top_k"]).values
        found = [value for _, value in token["features"]]
        assert found == pytest.approx(best[best > 0].tolist(), rel=TOLERANCE, abs=TOLERANCE)


def test_an_answer_ends_with_the_first_token_on_which_its_feature_fires(
    outcome: Outcome, asked: Battery
) -> None:
    answer = outcome.answer(STOP)
    feature = asked.requests[STOP]["steering"]["stop_when"]["feature"]
    _skip_if_near(asked.nearest(STOP, answer, "a", feature))
    f = asked.seen(STOP, answer, "a")[len(asked.requests[STOP]["prompt"]) :, feature]
    fires = (f > 0).tolist()
    if answer["stop_reason"] == "steering":
        assert fires.index(True) == len(fires) - 1
        assert answer["steering"]["stopped"]["feature"] == feature
    else:
        assert len(fires) == asked.requests[STOP]["max_tokens"]
        assert not any(fires[:-1])  # the last one is not looked at any more


@pytest.mark.parametrize("wave", [wave for wave in WAVES if wave != "everything"])
def test_answers_are_the_same_however_many_run_at_once(
    outcome: Outcome, asked: Battery, wave: str
) -> None:
    for name in WAVES[wave]:
        crowded, here = outcome.answer(name), outcome.answer(name, wave)
        if asked.expected(name, crowded)[2] < MARGIN:
            continue  # a batch of another shape may round to the other side of a jump
        same = [a == b for a, b in zip(crowded["tokens"], here["tokens"], strict=True)]
        until = same.index(False) if False in same else len(same)
        assert until > 0
        difference = _largest(crowded["logprobs"][:until], here["logprobs"][:until])
        assert difference < TOLERANCE, name
        if until < len(same):  # nearly equal tokens change places
            assert abs(crowded["logprobs"][until] - here["logprobs"][until]) < TOLERANCE, name


def test_a_request_that_nobody_steers_is_that_of_vllm_alone(
    outcome: Outcome, record_property: Callable[[str, object], None]
) -> None:
    ours = outcome.answer("unsteered", "nobody")
    theirs = _known(outcome.plain, "waves", "alone")["unsteered"]
    difference = _largest(ours["logprobs"], theirs["logprobs"])
    record_property("nats from vLLM alone", difference)
    assert ours["tokens"] == theirs["tokens"]
    if outcome.name == "eager" or REHEARSAL:
        assert ours["logprobs"] == theirs["logprobs"]
    else:  # the compiler may fuse other things where the op stands between them
        assert difference < TOLERANCE


def test_divergence_of_a_scored_text_is_that_of_transformers(
    outcome: Outcome, asked: Battery, record_property: Callable[[str, object], None]
) -> None:
    kl, itself = outcome.scored["steered"], outcome.scored["itself"]
    expected = asked.kl().tolist()
    record_property("nats from the reference's KL", _largest(kl, expected))
    assert max(expected) > EFFECT * TOLERANCE
    assert kl == pytest.approx(expected, rel=0.05, abs=TOLERANCE)
    assert all(0 <= value < 1e-9 for value in itself)


def test_the_engine_came_to_its_end(outcome: Outcome) -> None:
    for found in (outcome.steered, outcome.plain):
        assert found["why"].startswith("the engine ended with 0:"), found["why"]


def test_top_k_saes_are_on_the_device_from_the_start(outcome: Outcome) -> None:
    exact_from_row, held = outcome.engine["exact_from_row"], set(outcome.engine["held"])
    top_k = {name for name, exact in exact_from_row.items() if not exact}
    assert "gate" in top_k
    if REHEARSAL:  # where the host's memory is the device's
        assert not held
        return
    assert top_k <= held
    assert len(held - top_k) <= 1  # whose turn it was when memory was measured


def test_scheduling_is_asynchronous_unless_it_is_switched_off(outcome: Outcome) -> None:
    if REHEARSAL:
        pytest.skip("vLLM's CPU platform has none")
    assert outcome.engine["async_scheduling"] == (outcome.name != "synchronous")


def test_passes_of_rows_are_replayed_and_full_ones_run_in_pieces(outcome: Outcome) -> None:
    rows, whole = outcome.graphs("seven", ROWS), outcome.graphs("three whole", WHOLE)
    mode = outcome.engine["cudagraph_mode"]
    if mode == "NONE":
        assert rows == whole == {"NONE"}
    elif "PIECEWISE" in mode:
        assert STEER in outcome.engine["splitting_ops"]
        assert rows == ({"PIECEWISE", "FULL"} if "FULL" in mode else {"PIECEWISE"})
        assert whole == {"PIECEWISE"}
    else:
        assert "FULL" in rows and whole == {"NONE"}
    assert not outcome.graphs("seven", WHOLE)


def _skip_if_near(nearest: float) -> None:
    if nearest < MARGIN:
        pytest.skip(f"rounding decides: {nearest:.1e} from a jump")


def _largest(left: Any, right: Any) -> float:
    return max((abs(a - b) for a, b in zip(left, right, strict=True)), default=0.0)
