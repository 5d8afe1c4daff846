"""SAEs on real tokens through a real model: the right one fits, and what is wrong shows."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from safetensors.torch import load_file, save_file

from sae.self_check import TEXT, VARIANCE_MARGIN, Outcome
from sae.source import ResolvedSAE
from server.self_check import check_offline
from steering.request.plan import COVERS_PROMPT, PlannedRead, SteeringPlan
from tests.engine import engine as engines
from tests.engine import server as servers
from tests.engine.engine import Engine
from tests.models import make_tiny_model, make_tiny_sae
from tests.small_dictionaries import SMALL_DICTIONARIES

SPECIAL_TOKEN_IDS: Final = tuple(range(17))
D_IN, NUM_LAYERS = 576, 30
#: What the demo SAE is changed to: what of its configuration, and what is then said of it.
WRONG: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "layer": (
        {"hook_name": "blocks.5.hook_resid_post"},
        "variance explained is 0.48 below what is stated; likely the wrong layer, hook or model",
    ),
    "hook": (
        {"hook_name": "blocks.14.hook_mlp_out"},
        "the mean of the stream would reconstruct it better; likely the wrong layer, hook",
    ),
    "architecture": (
        {"architecture": "standard"},
        "of all features fire on each token; variance explained is 0.",
    ),
    "model": (
        {"model_name": "HuggingFaceTB/SmolLM2-135M"},
        "it was trained on HuggingFaceTB/SmolLM2-135M and this is ",
    ),
}
#: Seconds until the server has checked its SAEs.
CHECK_TIMEOUT: Final = 120.0


def altered(sae: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy of an SAE whose configuration says something else."""
    shutil.copytree(sae, folder)
    path = folder / "cfg.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        (config if key in config else config["metadata"])[key] = value
    path.write_text(json.dumps(config))
    if config["architecture"] == "standard":
        weights = folder / "sae_weights.safetensors"
        tensors = load_file(weights)
        del tensors["threshold"]
        save_file(tensors, weights)
    return folder


@pytest.fixture(scope="module")
def smollm2(
    demo_model: Path, demo_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """SmolLM2 with the demo SAE as it is, named `right`, and wrong in each way; and a transcoder
    and an SAE of heads."""
    folder = tmp_path_factory.mktemp("saes")
    saes = {"right": demo_sae, **SMALL_DICTIONARIES}
    for name, (changes, _) in WRONG.items():
        saes[name] = altered(demo_sae, folder / name, changes)
    engine = engines.start(
        demo_model,
        saes,
        d_model=D_IN,
        num_layers=NUM_LAYERS,
        special_token_ids=SPECIAL_TOKEN_IDS,
        max_model_len=1024,
    )
    yield engine
    engine.shut_down()


def check(engine: Engine, name: str) -> Outcome:
    path = str(engine.saes[name])
    return check_offline(engine.llm, ResolvedSAE(name, path, path=path))


def test_right_sae_fits_as_its_card_says(smollm2: Engine) -> None:
    outcome = check(smollm2, "right")
    assert outcome.complaints == []
    assert outcome.measured.tokens == 437
    assert outcome.measured.l0 == pytest.approx(33.1, rel=0.02)
    assert outcome.measured.variance_explained == pytest.approx(0.806, abs=0.005)


@pytest.mark.parametrize("name", SMALL_DICTIONARIES)
def test_what_a_dictionary_reconstructs_is_where_it_writes(smollm2: Engine, name: str) -> None:
    outcome = check(smollm2, name)
    assert outcome.complaints == []
    stated = outcome.stated.variance_explained
    assert stated is not None
    assert outcome.measured.variance_explained == pytest.approx(stated, abs=VARIANCE_MARGIN)


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_one_line(smollm2: Engine, what: str) -> None:
    outcome = check(smollm2, what)
    assert WRONG[what][1] in outcome.line()
    assert "\n" not in outcome.line()


def test_check_shares_no_cached_block_and_leaves_no_trace(smollm2: Engine) -> None:
    prompt = smollm2.llm.get_tokenizer().encode(TEXT)
    smollm2.state.take_stats()
    check(smollm2, "right")
    stats = smollm2.state.take_stats()
    moved = {k for k, value in stats.items() if value and not k.endswith("_capacity")}
    assert not moved
    clean, again = (smollm2.generate([prompt], [None], max_tokens=1)[0] for _ in range(2))
    assert clean.cached == 0
    assert again.cached > 0


def test_check_beside_steered_requests_is_not_counted_among_them(smollm2: Engine) -> None:
    state = smollm2.state
    read = PlannedRead(0, 1, COVERS_PROMPT, 0, 4, None)
    clients = SteeringPlan("client", 1, 4, (), True, False, read, awaited=True)
    own = replace(clients, key="check", read=replace(read, fit=True), internal=True)
    state.add_request("check", own)
    state.add_request("client", clients)
    assert state.take_stats()["slots_in_use"] == 1
    state.remove_request("check")
    state.remove_request("client")
    assert state.take_stats()["slots_in_use"] == 0


# The command, and a server


@pytest.mark.slow
def test_inspect_runs_the_model_and_prints_what_it_measured(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny-it")
    sae = make_tiny_sae(tmp_path / "sae", metadata={"model_name": "tiny", "l0": 40, "fvu": 0.1})
    done = subprocess.run(
        [
            *(sys.executable, "-m", "server", "inspect-sae", str(sae), "--model", str(model)),
            *("--dtype", "float32", "--max-model-len", "256"),
        ],
        cwd=Path(__file__).parents[2],
        env={**servers.environment(), "VLLM_LOGGING_LEVEL": "ERROR"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert "SAE sae" in lines[0]  # nothing of vLLM's before it
    assert "on 254 tokens" in done.stdout
    (l0,) = (line for line in lines if line.startswith("│ L0"))
    assert l0.split()[-2] == "40"
    assert lines[-1].startswith("warning: ")
    assert "it was trained on tiny and this is" in lines[-1]


@pytest.fixture
def fresh_server(demo_model: Path, demo_sae: Path, tmp_path: Path) -> Iterator[servers.LiveServer]:
    """A server of one request at a time that nobody has asked anything."""
    far = altered(demo_sae, tmp_path / "far", WRONG["layer"][0])
    server = servers.start(
        demo_model, {"l14": demo_sae, "far": far}, tmp_path / "log", "--max-num-seqs", "1"
    )
    try:
        servers.wait_until_ready(server)
        yield server
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_server_checks_in_the_background_and_no_client_notices(
    fresh_server: servers.LiveServer,
) -> None:
    first = fresh_server.choice("The capital of France is")  # while the check runs, or just after
    lines = checks(fresh_server, expected=2)
    right = next(line for line in lines if "'l14'" in line)
    assert right.endswith("(stated 0.82) on 437 tokens")
    assert "WARNING" not in right
    far = next(line for line in lines if "'far'" in line)
    assert "WARNING" in far
    assert far.endswith("likely the wrong layer, hook or model (base for instruct, say)")
    found = fresh_server.metrics()
    assert {name for name, value in found.items() if value and "_created" not in name} == {
        "steering_slots_capacity",
        "steering_rows_capacity",
    }
    again = fresh_server.choice("The capital of France is")
    assert again["token_ids"] == first["token_ids"]
    assert again["logprobs"] == first["logprobs"]
    assert "Traceback" not in fresh_server.log.read_text()
    fresh_server.process.send_signal(signal.SIGTERM)
    fresh_server.process.wait(CHECK_TIMEOUT)
    # vLLM stops the engine and then the task that reads from it: a task that is quick enough in
    # between logs EngineDeadError. Nothing of ours may end that way.
    repository = Path(__file__).parents[2]
    log = fresh_server.log.read_text()
    for ours in ("server", "steering", "sae"):
        assert f'File "{repository / ours}/' not in log


def checks(server: servers.LiveServer, expected: int) -> list[str]:
    """The log's lines of the self-check, once there are as many as expected."""
    deadline = time.monotonic() + CHECK_TIMEOUT
    while True:
        log = server.log.read_text(errors="replace")
        found = [line for line in log.splitlines() if "self-check" in line]
        if len(found) >= expected:
            return found
        assert time.monotonic() < deadline, server.last_log_lines()
        time.sleep(0.2)
