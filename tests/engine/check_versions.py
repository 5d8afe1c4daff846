"""Ask vLLM wheels, or folders that they were unpacked into, whether this project can steer them.

    python -m tests.engine.check_versions vllm-0.33.0-*.whl some/folder ...

Nothing is downloaded, installed or imported: `pip download --no-deps vllm==0.33.0` gets a wheel for
it. Exits 1 where something is lacking in any of them.
"""

from __future__ import annotations

import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from server import seams as of_server
from steering.vllm import seams as of_steering
from steering.vllm.source import Source

PACKAGE = "vllm"
SEAMS = of_steering.SEAMS | of_server.SEAMS


def main(given: Sequence[str]) -> int:
    """Print a line for each wheel or folder, and one more for everything that it lacks."""
    if not given:
        print(__doc__)
        return 2
    lacking = [what for path in given for what in check(Path(path))]
    return 1 if lacking else 0


def check(path: Path) -> list[str]:
    """What a wheel or a folder lacks, printed as well."""
    if path.is_dir():
        return _report(path / PACKAGE if (path / PACKAGE).is_dir() else path, path.name)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as wheel:
        texts = [
            name
            for name in wheel.namelist()
            if name.startswith(f"{PACKAGE}/") and name.endswith(".py")
        ]
        wheel.extractall(folder, texts)
        return _report(Path(folder) / PACKAGE, path.name)


def _report(package: Path, name: str) -> list[str]:
    started = time.process_time()
    source = Source(package)
    lacking = source.lacking(SEAMS)
    seconds = time.process_time() - started
    count = sum(map(len, SEAMS.values()))
    print(
        f"{name}: vLLM {source.version}: {count} seams, {len(lacking) or 'nothing'} lacking "
        f"({seconds:.2f} s)"
    )
    for what in lacking:
        print(f"  {what}")
    return lacking


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
