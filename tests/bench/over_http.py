"""Throughput and latency over HTTP: a real server, steered against unsteered in alternation.

``python -m tests.bench.over_http [out.json] [--full] [--rounds N]``

``vllm-sae serve`` in processes of its own, the demo model and SAE, asked by the client of vLLM's
own ``vllm bench serve``. Its command line sends one ``--extra-body`` with every request; its
Python function also takes each request's own fields (``request_overrides``), which is how K
configurations get there. All 32 requests are sent at once and streamed; TTFT and ITL are the
client's. Client and server share the machine. Cases and shapes are those of ``cases.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

from server.commands.demo_model import ensure_demo_model
from tests.bench.alternate import Run
from tests.bench.cases import FULL, REQUESTS, SAE_NAME, SHORT, TOPK_NAME, Field, Shape, compare
from tests.bench.demo_engine import MAX_TOKENS, SAE, prompts, topk_sae
from tests.bench.record import Plot, Record, Rounds, arguments
from tests.engine.server import MODEL, LiveServer, wait_until_ready

FLAGS: Final = (
    *("--dtype", "float32", "--max-model-len", str(MAX_TOKENS)),
    *("--max-num-batched-tokens", str(MAX_TOKENS), "--max-num-seqs", str(REQUESTS)),
    # Repeated prompts would be found in it, and nothing would be measured.
    "--no-enable-prefix-caching",
    *("--served-model-name", MODEL, "--host", "127.0.0.1"),
)

ROUNDS: Final = Rounds(short=3, full=8)


def serve(saes: dict[str, Path], log: Path, *flags: str) -> LiveServer:
    """Start the server; it does not answer yet. `flags` overrule `FLAGS`."""
    model = ensure_demo_model()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    # What `demo_engine` set for engines in this process is not for the server's.
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "server", "serve", str(model), *FLAGS, *flags),
                *(word for name, path in saes.items() for word in ("--sae", f"{name}={path}")),
                *("--port", str(port)),
            ],
            cwd=Path(__file__).parents[2],
            env={
                **{name: value for name, value in os.environ.items() if name not in ours},
                "VLLM_CPU_KVCACHE_SPACE": "2",
            },
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    return LiveServer(f"http://127.0.0.1:{port}", log, model, saes, process)


def ask(server: LiveServer, shape: Shape, fields: list[Field]) -> Run:
    """Send one request for each of ``fields`` at once, by vLLM's benchmark client."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    requests = [
        SampleRequest(
            prompt=prompt,
            prompt_len=shape.prompt,
            expected_output_len=shape.generated,
            request_overrides=None if field is None else {"steering": dict(field)},
        )
        for prompt, field in zip(prompts(len(fields), shape.prompt), fields, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        found: dict[str, Any] = asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION,
                endpoint_type="vllm",
                api_url=f"{server.base_url}/v1/completions",
                base_url=server.base_url,
                model_id=MODEL,
                model_name=MODEL,
                tokenizer=None,
                input_requests=requests,
                logprobs=None,
                request_rate=float("inf"),
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=[],
                selected_percentiles=[],
                ignore_eos=True,
                goodput_config_dict={},
                max_concurrency=None,
                lora_modules=None,
                extra_headers=None,
                extra_body={"temperature": 0.0},
                ready_check_timeout_sec=0,
            )
        )
    failed = [error for error in found["errors"] if error]
    expected = len(fields) * shape.generated
    if failed or found["total_output_tokens"] != expected:
        raise RuntimeError(f"{found['total_output_tokens']} of {expected} tokens came: {failed}")
    itl = [mean(itls) for itls in found["itls"] if itls]
    return Run(found["duration"], median(found["ttfts"]), median(itl) if itl else 0.0)


def edited_tokens(server: LiveServer) -> float:
    """The server's own count of tokens edited since it started."""
    samples = server.metrics().items()
    return sum(value for name, value in samples if name.startswith("steering_edited_tokens_total"))


def main() -> None:
    """Start the server, run every case and write the JSON."""
    parser = arguments(__doc__)
    args, rounds = ROUNDS.parse(parser)
    record = Record(
        "over_http",
        "Steered against unsteered over HTTP, 32 requests at once: medians (quartiles).",
        {
            "rounds": rounds,
            "requests": REQUESTS,
            "client": "vllm bench serve's",
            "flags": FLAGS,
        },
        Plot(x="configurations", y="throughput_ratio", series="shape, case, edits", line=1.0),
    )
    with tempfile.TemporaryDirectory() as folder:
        saes = {SAE_NAME: SAE, TOPK_NAME: topk_sae(Path(folder) / "topk")}
        server = serve(saes, Path(folder) / "server.log")
        try:
            wait_until_ready(server)
            compare(
                record,
                FULL if args.full else SHORT,
                rounds,
                lambda shape, fields: ask(server, shape, fields),
                lambda: edited_tokens(server),
            )
        finally:
            server.stop()
    record.save(args.json)


if __name__ == "__main__":
    main()
