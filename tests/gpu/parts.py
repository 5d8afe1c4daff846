"""What `make gpu` runs: parts that know nothing of each other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

INTERPRETED: Final = {"TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Part:
    """One process of `make gpu`.

    Attributes:
        name: of its files, too.
        about: what it shows, as the page says it.
        module: of Python, which is run with its result's file as the first argument; None for
            tests.
        tests: paths below ``tests/``, and more of pytest's arguments.
        arguments: more of the module's.
        seconds: it is ended after so many.
        gpus: it is left out where there are fewer.
        rehearsal: arguments in place of ``arguments`` or more of pytest's; None where a CPU cannot
            run it at all.
        interpreted: a rehearsal runs its kernels in Triton's interpreter.
    """

    name: str
    about: str
    module: str | None = None
    tests: Sequence[str] = ()
    arguments: Sequence[str] = ()
    seconds: int = 900
    gpus: int = 1
    rehearsal: Sequence[str] | None = field(default=())
    interpreted: bool = False

    def command(self, result: str, rehearsal: bool) -> list[str]:
        """What is run; ``result`` is the file that it writes."""
        more = list((self.rehearsal if rehearsal else self.arguments) or ())
        if self.module is not None:
            return [sys.executable, "-m", self.module, result, *more]
        options = ["-v", "-p", "no:cacheprovider", f"--junitxml={result}"]
        return [sys.executable, "-m", "pytest", *options, *self.tests, *more]

    @property
    def suffix(self) -> str:
        """Of its result's file."""
        return ".json" if self.module is not None else ".xml"


ENGINE: Final = "tests/gpu/test_engine_on_gpu.py"


def _engine(name: str, about: str, gpus: int = 1) -> Part:
    # The name in brackets, alone or before a request's or a wave's.
    chosen = ("-k", f"{name}- or {name}]")
    return Part(f"engine-{name}", about, tests=(ENGINE, *chosen), seconds=2700, gpus=gpus)


PARTS: Final = (
    Part(
        "kernels",
        "The Triton kernels against the reference, and replayed in a CUDA graph.",
        tests=("tests/gpu/test_kernel_on_gpu.py",),
        seconds=2700,
        interpreted=True,
    ),
    Part(
        "passes",
        "A worker's passes on the device against those on the host: whole encodes, weights that "
        "take turns, dictionaries in two halves, and that nothing waits for the device.",
        tests=("tests/gpu/test_passes_on_gpu.py",),
        interpreted=True,
    ),
    _engine("default", "As it comes: full and piecewise graphs, asynchronous scheduling."),
    _engine("piecewise", "Piecewise graphs alone."),
    _engine("full", "Full graphs alone: passes with a whole encode run eagerly."),
    _engine("eager", "No graphs: an unsteered request has every bit of vLLM's."),
    _engine("synchronous", "Without asynchronous scheduling."),
    _engine("two-ranks", "Two tensor-parallel ranks.", gpus=2),
    Part(
        "traps",
        "The traps of tests/engine on this engine, in eager mode.",
        tests=("tests/engine/test_traps.py",),
        seconds=2700,
        rehearsal=("-k", "reused_slot"),
    ),
    Part(
        "kernel-times",
        "Each kernel beside what the roofline predicts, with a cold L2.",
        module="tests.bench.kernel_gpu",
        seconds=1800,
        rehearsal=("--rehearse",),
        interpreted=True,
    ),
    Part(
        "steps",
        "Steps of an 8B model with random weights, steered and not, beside the roofline's.",
        module="tests.bench.step_gpu",
        seconds=3600,
        rehearsal=("--rehearse",),
    ),
    Part(
        "throughput",
        "Steered against unsteered, 32 requests at once in one engine.",
        module="tests.bench.throughput",
        arguments=("--full", "--dtype", "bfloat16"),
        seconds=1800,
        rehearsal=("--eager", "--rounds", "1"),
    ),
    Part(
        "reports",
        "Reports against none over HTTP, 256 requests at once.",
        module="tests.bench.reports",
        seconds=1800,
        rehearsal=("--rounds", "1"),
    ),
)


def chosen(only: Sequence[str] | None, rehearsal: bool, gpus: int) -> list[tuple[Part, str | None]]:
    """The parts to run, each with a reason if it is left out."""

    def why(part: Part) -> str | None:
        if rehearsal:
            return None if part.rehearsal is not None else "a CPU cannot run it"
        return f"{part.gpus} GPUs are needed, and here is {gpus}" if gpus < part.gpus else None

    return [(part, why(part)) for part in PARTS if only is None or part.name in only]
