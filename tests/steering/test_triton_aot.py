"""The Triton kernel compiled for GPUs that this machine does not have.

Every run compiles for the widest stream, where registers are scarcest; a nightly one, for all.
In a process of its own: where Triton's interpreter is on, nothing can be compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.bench import aot

ROOT = Path(__file__).parents[2]
FEW: Final = ((80, 90, 100), (8192,))
ALL: Final = ((80, 90, 100), (576, 2304, 4096, 5120, 8192))


@dataclass(frozen=True)
class Compiled:
    """The variants of these architectures and widths."""

    archs: Sequence[int]
    widths: Sequence[int]
    kernels: Sequence[dict[str, Any]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(FEW, id="few"),
        pytest.param(ALL, id="all", marks=pytest.mark.nightly),
    ],
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """What ``tests/bench/aot.py`` compiles."""
    archs, widths = request.param
    out = tmp_path_factory.mktemp("aot") / "aot.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.bench.aot", str(out)),
            *("--archs", *map(str, archs), "--widths", *map(str, widths)),
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Compiled(archs, widths, json.loads(out.read_text())["kernels"])


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_kernel_compiles_for_every_architecture_width_and_dtype(compiled: Compiled) -> None:
    variants = {(k["name"], k["arch"], k["d_in"], k["dtype"]) for k in compiled.kernels}
    assert variants == {
        (name, arch, d_in, dtype)
        for name in ("edit", "gates", "reads", "writes")
        for arch in compiled.archs
        for d_in in compiled.widths
        for dtype in ("bf16", "fp16", "fp32")
        if name in ("edit", "gates") or dtype == "bf16" or d_in in (4096, 8192)
    }


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("edit", "bf16, no residual"),  # what a module returns, and the heads' outputs
        ("edit", "fp32, bf16 residual"),  # of a graph that keeps a norm's output wide
        ("gates", "bf16, RMS norm"),  # a transcoder's feature as a condition
        ("gates", "bf16, layer norm"),
        ("reads", "bf16"),
        ("reads", "bf16, RMS norm"),
        ("reads", "bf16, layer norm"),
        ("writes", "bf16"),
        ("writes", "fp16, no residual"),  # with the limit of float16
    ],
)
def test_every_form_of_a_stream_is_compiled(compiled: Compiled, name: str, stream: str) -> None:
    of_form = [k for k in compiled.kernels if (k["name"], k["stream"]) == (name, stream)]
    assert {k["arch"] for k in of_form} == set(compiled.archs)


def test_no_variant_spills(compiled: Compiled) -> None:
    assert [k for k in compiled.kernels if k["spill_bytes"]] == []


def test_every_edit_keeps_enough_rows_in_flight_to_hide_memory_latency(
    compiled: Compiled,
) -> None:
    # Little's law on the fastest memory, a B200's: 8 TB/s for 0.8 us are 6.4 MB, over 148
    # multiprocessors 42 KiB each. Of float32 streams, which nobody serves, half is asked.
    least = {"bf16": 42, "fp16": 42, "fp32": 21}
    edits = [k for k in compiled.kernels if k["name"] == "edit"]
    assert [k for k in edits if k["in_flight_bytes"] < 1024 * least[k["dtype"]]] == []


def test_the_page_of_the_kernels_has_these_variants(compiled: Compiled) -> None:
    page = (ROOT / "steering" / "worker" / "ops" / "README.md").read_text()
    lines = aot.table(aot.Kernel(**k) for k in compiled.kernels)
    assert set(lines) <= set(page.splitlines())
    if (compiled.archs, compiled.widths) == ALL:
        assert "\n".join(lines) in page
