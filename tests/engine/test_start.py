"""Commands as a shell sees them: a batch file answered to its end, an engine that cannot start."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.engine.server import environment
from tests.models import make_tiny_sae

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TIMEOUT: Final = 800.0
CLAMP: Final = {"feature": 3, "op": "clamp", "value": 50}
TINY: Final = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128")


def run(*words: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run `vllm-sae WORDS` to its end; `without` is a variable that is taken away."""
    variables = {name: value for name, value in environment().items() if name != without}
    return subprocess.run(
        [sys.executable, "-m", "server", *words],
        cwd=Path(__file__).parents[2],
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


#: The lines' own part of a body, and the code and path of the refusal; None where it is answered.
LINES: Final[dict[str, tuple[dict[str, Any], tuple[str, str] | None]]] = {
    "plain": ({}, None),
    "steered": ({"steering": {"interventions": [CLAMP]}}, None),
    "reported": ({"steering": {"interventions": [CLAMP], "report": True}}, None),
    "two choices": (
        {"steering": {"interventions": [CLAMP], "report": True}, "n": 2, "temperature": 1},
        None,
    ),
    "wrong": (
        {"steering": {"interventions": [{**CLAMP, "feature": 9999}]}},
        ("feature_out_of_range", "steering.interventions[0].feature"),
    ),
    "too long a read": (
        {"steering": {"read": {"top_k": 64}}, "max_tokens": 60},
        ("invalid_value", "steering.read"),
    ),
    "misplaced": ({"metadata": {"steering": "x"}}, ("misplaced_steering", "metadata.steering")),
}


def test_lines_of_a_batch_file_are_steered_or_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, sae = tiny_model("llama"), make_tiny_sae(tmp_path / "sae")
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": str(model), "messages": messages, "max_tokens": 4, "temperature": 0}
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {**body, **more},
        }
        for name, (more, _) in LINES.items()
    ]
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    done = run(
        *("run-batch", "-i", str(asked), "-o", str(answered), "--model", str(model)),
        *("--sae", f"a={sae}", "--steering-max-read-values", "1000", *TINY),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    entries = {e["custom_id"]: e for e in map(json.loads, answered.read_text().splitlines())}
    assert [*entries] == [*LINES]
    for name, (_, refused) in LINES.items():
        response, error = entries[name]["response"], entries[name]["error"]
        if refused is None:
            assert (response["status_code"], error) == (200, None), name
        else:
            assert response["status_code"] == 400, name
            assert (error["error"]["code"], error["error"]["param"]) == refused
    bodies = {name: entry["response"]["body"] for name, entry in entries.items()}
    texts = {n: bodies[n]["choices"][0]["message"]["content"] for n in ("plain", "steered")}
    assert texts["plain"] != texts["steered"]
    assert "steering" not in bodies["plain"] and "steering" not in bodies["steered"]
    assert bodies["reported"]["choices"][0]["message"]["content"] == texts["steered"]
    (entry,) = bodies["reported"]["steering"]["interventions"]
    assert entry["tokens_edited"] > 4
    assert [c["index"] for c in bodies["two choices"]["steering"]["choices"]] == [0, 1]


def test_engine_that_cannot_start_ends_with_its_cause(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    sae = make_tiny_sae(tmp_path / "sae")
    done = run(
        *("serve", str(tiny_model("llama")), "--sae", f"a={sae}", *TINY),
        *("--kv-cache-memory-bytes", "1000", "--port", "0"),
        without="VLLM_CPU_KVCACHE_SPACE",  # which would overrule the flag
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("vllm-sae: error: ValueError: No available memory for the cache blocks")


def test_place_that_the_model_lacks_ends_with_code_2_and_one_line(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    # Only the worker, which has the model, can tell.
    sae = make_tiny_sae(tmp_path / "sae", hook_kind="hook_resid_mid")
    done = run("serve", str(tiny_model("cohere")), "--sae", f"a={sae}", *TINY, "--port", "0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "vllm-sae: error: blocks.1.hook_resid_mid: CohereDecoderLayer: attention and MLP read the "
        "same stream; there is none between them"
    )
