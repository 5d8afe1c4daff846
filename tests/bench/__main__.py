"""Run the benchmarks one after another, then make the page: ``make bench``.

``python -m tests.bench [--full] [--only NAME ...] [--out FOLDER]``

The short set takes a quarter of an hour on two cores, a third of it to start engines; ``--full``
runs every case more often and takes over an hour. A script that fails does not stop the others; the
exit status is then 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.bench import table
from tests.bench.record import RESULTS

SCRIPTS: Final = (
    "op_alone",
    "pass_alone",
    "admission",
    "label_search",
    "op_share",
    "startup",
    "serve_start",
    "idle",
    "throughput",
    "over_http",
    "reports",
    "reacting",
    "dictionaries",
    "full_passes",
    "streamed_reads",
    "studies",
    "contrast",
    "beside_study",
    "peers",
)


def main() -> int:
    """Run what the command line names; 1 if something failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every case, and more repetitions")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="NAME")
    parser.add_argument("--out", type=Path, help="default: tests/bench/results/")
    args = parser.parse_args()
    failed = []
    for name in args.only:
        command = [sys.executable, "-m", f"tests.bench.{name}"]
        if args.out is not None:
            command.append(str(args.out / f"{name}.json"))
        if args.full:
            command.append("--full")
        if subprocess.run(command, cwd=Path(__file__).parents[2]).returncode:
            failed.append(name)
    table.write(RESULTS if args.out is None else args.out)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
