"""Against others on the same machine, model, prompts and tokens, each in turn with ours.

``python -m tests.bench.peers [out.json] [--full] [--rounds N]``

32 requests of the decode shape of ``cases.py``, 8 clamps each, K = 1 and K = 32 configurations.

* transformers and SAELens (``peer_saelens.py``), with as many threads as ours. A SAELens hook
  applies one configuration a forward pass, so 32 configurations are 32 batches of one request.
  Given beside it: one batch with a hook written for rows, which SAELens leaves to its user.
* vllm-lens (``peer_vllm_lens.py``), whose vectors are added, not clamped; besides against its own
  unsteered speed. It pins another vLLM and Python, so no environment is made for it here.

Environments are never the server's. ``BENCH_SAELENS_PYTHON`` and ``BENCH_VLLM_LENS_PYTHON`` name
interpreters; without the first an environment is made with pip (about two minutes), without the
second that peer is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from server.commands.demo_model import default_cache_dir, ensure_demo_model
from tests.bench.alternate import Compared, Run, alternate
from tests.bench.cases import DECODE, REQUESTS, SAE_NAME, Field, dealt, steering
from tests.bench.demo_engine import SAE, demo_engine, prompts, run
from tests.bench.record import Record, Rounds, arguments, spread

EDITS: Final = 8
BENCH: Final = Path(__file__).parent
CONSTRAINTS: Final = BENCH.parents[1] / "constraints.txt"

ROUNDS: Final = Rounds(short=2, full=4)


class Peer:
    """Another system in a process of its own, asked by lines of JSON."""

    def __init__(self, python: str, script: str) -> None:
        self.process = subprocess.Popen(
            [python, str(BENCH / script), str(ensure_demo_model()), str(SAE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            text=True,
        )
        self._answer()  # ready

    def ask(self, fields: Sequence[Field], *, rows: bool = False) -> dict[str, Any]:
        """Seconds and tokens of the decode shape with these ``steering`` fields."""
        assert self.process.stdin is not None
        job = {
            "prompts": prompts(len(fields), DECODE.prompt),
            "edits": [clamps(field) for field in fields],
            "tokens": DECODE.generated,
            "rows": rows,
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def run(self, fields: Sequence[Field], *, rows: bool = False) -> Run:
        """The seconds alone."""
        return Run(self.ask(fields, rows=rows)["seconds"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


def clamps(field: Field) -> list[tuple[int, float]]:
    """The clamps of a ``steering`` field, as peers are told of them."""
    return [] if field is None else [(e["feature"], e["value"]) for e in field["interventions"]]


def saelens_python() -> str:
    """An interpreter that has sae-lens, in an environment made for it when first asked for."""
    given = os.environ.get("BENCH_SAELENS_PYTHON")
    if given:
        return given
    folder = default_cache_dir() / "bench-saelens"
    python, done = folder / "bin" / "python", folder / "done"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS)]
        # torch first and as it is here, so that nothing draws a CUDA build.
        subprocess.run([*install, f"torch=={torch.__version__}"], check=True)
        subprocess.run([*install, "sae-lens", "transformers", "accelerate"], check=True)
        uninstall = [str(python), "-m", "pip", "uninstall", "-q", "-y"]
        subprocess.run([*uninstall, "torchvision", "torchaudio", "torchcodec"], check=True)
        done.touch()
    return str(python)


def main() -> None:
    """Run every peer in turn with ours and write the JSON."""
    parser = arguments(__doc__)
    args, rounds = ROUNDS.parse(parser)
    record = Record(
        "peers",
        "Others' time for the same 32 requests, as a multiple of ours: medians (quartiles).",
        {
            "rounds": rounds,
            "requests": REQUESTS,
            "edits": EDITS,
            "threads": torch.get_num_threads(),
        },
    )
    engine = demo_engine({SAE_NAME: SAE})
    batch = prompts(REQUESTS, DECODE.prompt)

    def ours(fields: Sequence[Field]) -> Run:
        return run(engine, batch, fields, DECODE.generated)

    def add(system: str, k: int, compared: Sequence[Compared], **more: Any) -> dict[str, Any]:
        times = spread([1 / one.throughput_ratio for one in compared])
        seconds = spread([one.run.seconds for one in compared])
        record.add(system=system, configurations=k, seconds=seconds, times_ours=times, **more)
        return times

    plain: list[Field] = [None] * REQUESTS
    saelens = Peer(saelens_python(), "peer_saelens.py")
    hook = "SAELens hook, one configuration a pass"
    rows = "SAELens hook written for rows, one batch"
    for k in (1, REQUESTS):
        fields = dealt(steering(k, EDITS), REQUESTS)
        cases = {"ours (control)": partial(ours, fields), hook: partial(saelens.run, fields)}
        if k == 1:
            cases["transformers, nothing edited"] = partial(saelens.run, plain)
        else:
            cases[rows] = partial(saelens.run, fields, rows=True)
        found = alternate(partial(ours, fields), cases, rounds)
        mine = [one.tokens for one in engine.generate(batch, fields, DECODE.generated)]
        theirs = saelens.ask(fields, rows=True)["tokens"]
        same = sum(a == b for a, b in zip(mine, theirs, strict=True))
        for system, compared in found.items():
            more = {"same_texts": f"{same} of {REQUESTS}"} if "hook" in system else {}
            times = add(system, k, compared, **more)
            if system == hook and k == REQUESTS:
                what = "time of transformers with SAELens hooks / ours, K = 32"
                record.target(what, times, 10.0)
    saelens.close()

    lens_python = os.environ.get("BENCH_VLLM_LENS_PYTHON")
    if lens_python:
        lens = Peer(lens_python, "peer_vllm_lens.py")
        fields = dealt(steering(REQUESTS, EDITS), REQUESTS)
        against_ours = alternate(
            partial(ours, fields), {"vllm-lens, vectors": partial(lens.run, fields)}, rounds + 2
        )
        against_own = alternate(
            partial(lens.run, plain), {"steered": partial(lens.run, fields)}, rounds + 2
        )
        own = spread([one.throughput_ratio for one in against_own["steered"]])
        for system, compared in against_ours.items():
            add(system, REQUESTS, compared, steered_to_own_unsteered=own)
        lens.close()
    else:
        record.add(system="vllm-lens 1.3", configurations=REQUESTS, seconds="not run here")
    engine.shut_down()
    record.save(args.json)


if __name__ == "__main__":
    main()
