"""Everything that a GPU can show of this project, in one command: ``make gpu CUDA=1``.

``python -m tests.gpu [--only NAME ...] [--out FOLDER]``

Takes one to two hours on one GPU of 40 GB or more; tensor parallelism needs two. No model hub is
asked for anything. Each part is a process of its own: one that fails or hangs costs only itself,
and what is known is written after each. The folder then holds ``gpu.json``, ``gpu.md`` and a log of
each part; send back the first two.

Exit status 0 if every part that could run passed, 1 if one failed, 2 without a GPU. ``--device
cpu`` rehearses it: every part on a CPU, kernels in Triton's interpreter. That shows the script, and
nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Final

import torch

from tests.bench.record import machine
from tests.gpu import page
from tests.gpu.parts import PARTS, chosen
from tests.gpu.running import LEFT_OUT, PASSED, ROOT, left_out, run

NO_GPU: Final = 2
NAMES: Final = tuple(part.name for part in PARTS)


def main() -> int:
    """Run the parts; see above for what is returned."""
    args = _arguments()
    rehearsal: bool = args.device == "cpu"
    if not rehearsal and not torch.cuda.is_available():
        print(
            f"no CUDA device (torch {torch.__version__} sees none): nothing was run; on a machine "
            "with a GPU: make gpu CUDA=1",
            file=sys.stderr,
        )
        return NO_GPU
    # Where a machine is lent for a time, its end is a signal: the part under way ends with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder: Path = args.out or ROOT / "build" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "rehearsal": rehearsal,
        "begun": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "machine": {**machine(), **gpus()},
        "parts": [],
    }
    parts = chosen(args.only, rehearsal, torch.cuda.device_count())
    for number, (part, why) in enumerate(parts, 1):
        print(f"[{number}/{len(parts)}] {part.name}: {part.about}", flush=True)
        one = run(part, folder, rehearsal) if why is None else left_out(part, why)
        found["parts"].append(one)
        write(found, folder)
        print(f"    {said(one)}", flush=True)
    print()
    for line in page.last_lines(found):
        print(line)
    print(f"send back: {folder / 'gpu.json'} and {folder / 'gpu.md'}")
    return 1 if any(one["status"] not in (PASSED, LEFT_OUT) for one in found["parts"]) else 0


def write(found: dict[str, Any], folder: Path) -> None:
    """The JSON, and the page beside it, whose faults must not cost the JSON."""
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    try:
        text = page.page(found)
    except Exception:
        text = f"```\n{traceback.format_exc()}```\n"
    (folder / "gpu.md").write_text(text)


def said(one: dict[str, Any]) -> str:
    """How a part ended, in a line."""
    if one["status"] == LEFT_OUT:
        return f"{LEFT_OUT}: {one['why']}"
    return f"{one['status']} in {one['seconds']:.0f} s{page.counted(one)}"


def gpus() -> dict[str, Any]:
    """What CUDA says of the devices, and the driver."""
    if not torch.cuda.is_available():
        return {"gpus": []}
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm"
    return {
        "gpus": [
            {
                "name": one.name,
                "memory_gib": round(one.total_memory / 2**30, 1),
                "capability": f"{one.major}.{one.minor}",
                "multiprocessors": one.multi_processor_count,
            }
            for one in every
        ],
        "cuda": torch.version.cuda,
        "nvidia_smi": (_output("nvidia-smi", query, "--format=csv") or "").splitlines(),
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, help="default: build/gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
