"""Start-up: `vllm-sae serve` against vLLM's own server, from its command to its first answer.

``python -m tests.bench.serve_start [out.json] [--full] [--rounds N]``

The demo model in eager mode, so that nothing waits for a compiler; vLLM's server with none of this
project's plugins. In alternation, as everywhere: each start of ours stands between two of vLLM's.
What a server with an SAE does beside: it checks vLLM's seams, opens and scans the SAE, follows the
layers' code, compiles the CPU kernel and, once it answers, checks itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Final

from server.commands.demo_model import ensure_demo_model
from tests.bench.alternate import Run, alternate
from tests.bench.cases import SAE_NAME
from tests.bench.demo_engine import SAE
from tests.bench.over_http import FLAGS
from tests.bench.record import Record, Rounds, arguments, spread
from tests.engine.server import LiveServer, wait_until_ready

ROUNDS: Final = Rounds(short=2, full=5)
PLAIN: Final = "vLLM's server (control)"
#: Seconds that a server with an SAE may take longer.
MOST: Final = 10.0


def start(log: Path, command: Sequence[str], environment: dict[str, str]) -> Run:
    """The seconds from a server's start to its first answer; it is stopped then."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    started = perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, *FLAGS, "--enforce-eager", "--port", str(port)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    server = LiveServer(f"http://127.0.0.1:{port}", log, ensure_demo_model(), {}, process)
    try:
        wait_until_ready(server)
        return Run(perf_counter() - started)
    finally:
        server.stop()


def main() -> None:
    """Start them in turn, and write the JSON."""
    parser = arguments(__doc__)
    args, rounds = ROUNDS.parse(parser)
    # Set for engines in this process where `demo_engine` was imported.
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        os.environ.pop(name, None)
    model = str(ensure_demo_model())
    record = Record(
        "serve_start",
        "Seconds from the command to the first answer of a server: medians (quartiles).",
        {"rounds": rounds, "eager": True},
    )
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        ours = partial(start, log, ("server", "serve", model))
        with_sae = ("server", "serve", model, "--sae", f"{SAE_NAME}={SAE}")
        plain: Callable[[], Run] = partial(
            start,
            log,
            ("vllm.entrypoints.openai.api_server", "--model", model),
            {"VLLM_PLUGINS": ""},
        )
        cases: dict[str, Callable[[], Run]] = {
            PLAIN: plain,
            "vllm-sae serve, no SAE": partial(ours, {}),
            "vllm-sae serve, one SAE": partial(start, log, with_sae, {}),
        }
        for case, compared in alternate(plain, cases, rounds, warm=False).items():
            longer = [
                one.run.seconds - (one.before.seconds + one.after.seconds) / 2 for one in compared
            ]
            record.add(
                case=case,
                seconds=spread([one.run.seconds for one in compared]),
                times_vllms=spread([1 / one.throughput_ratio for one in compared]),
                seconds_longer=spread(longer),
            )
            if "one SAE" in case:
                what = "start-up: with one SAE, seconds longer than vLLM's server"
                record.target(what, spread(longer), MOST, at_most=True)
    record.save(args.json)


if __name__ == "__main__":
    main()
