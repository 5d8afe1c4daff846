"""Time the kernel on a GPU and hold it against the roofline: one command confirms or refutes it.

``python -m tests.bench.kernel_gpu [out.json]`` on a machine with an A100, H100, H200 or B200. Exit
status 1 if some case takes over ``ALLOWED`` times what ``tests/bench/roofline.py`` predicts.

Each launch finds a cold L2, as in a decode step, which streams the model's weights between two
hooks: a CUDA graph of (wipe L2, launch) pairs is timed against one of wipes alone, the two in
alternation, and the medians are subtracted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
import triton

from steering.request.limits import POSITION_LIMIT
from steering.request.plan import OP_CLAMP, PlannedEdit
from steering.worker.gates import GateState, GateTable
from steering.worker.ops import triton_kernel
from steering.worker.ops.buffers import Buffers
from steering.worker.ops.layout import (
    MAX_ENTRIES,
    NO_SLOT,
    P_DECODER_SCALE,
    P_GAIN,
    P_GATE_BIAS,
    P_SINK,
)
from steering.worker.rows import RowPool
from steering.worker.slots import EditTable, SlotFacts
from tests.bench.roofline import (
    DEVICES,
    LLAMA_8B,
    LLAMA_70B,
    Device,
    decode_seconds,
    idle_seconds,
    moved,
    op_seconds,
    prefill_seconds,
)

ALLOWED: Final = 1.5
PAIRS: Final = 10
REPEATS: Final = 30
MODELS: Final = {4096: LLAMA_8B, 8192: LLAMA_70B}


@dataclass(frozen=True)
class Case:
    """One timing.

    Attributes:
        edits: of every token; 0 where no token has a slot.
        configurations: distinct edit lists, each with rows of its own.
        share: of the step that these tokens make: decode up to 256 tokens at a context of 1024,
            prefill above.
        bandwidth: bytes a second that the kernel moved, L2 hits included.
    """

    d_in: int
    tokens: int
    edits: int
    configurations: int
    measured_us: float
    predicted_us: float
    share: float
    bandwidth: float


def cases() -> Iterator[tuple[int, int, int, int]]:
    """``(d_in, tokens, edits, configurations)``."""
    for d_in in MODELS:
        for tokens in (1, 32, 256, 2048):
            yield d_in, tokens, 0, 1
            for edits in (1, 8, 64):
                for configurations in sorted({1, min(tokens, 256)}):
                    yield d_in, tokens, edits, configurations


def measure(device: Device, d_in: int, tokens: int, edits: int, configurations: int) -> Case:
    """Time one case."""
    launch = _prepare(d_in, tokens, edits, configurations)
    measured = _seconds(launch, device)
    if edits:
        predicted = op_seconds(device, d_in, 2, tokens, edits, configurations)
        one = moved(d_in, 2, edits)
        traffic = tokens * (one.minimum + one.metadata)
    else:
        predicted = idle_seconds(device, d_in, 2, tokens)
        traffic = 4 * tokens
    model = MODELS[d_in]
    step = (
        decode_seconds(device, model, tokens, 1024)
        if tokens <= 256
        else prefill_seconds(device, model, tokens)
    )
    return Case(
        d_in,
        tokens,
        edits,
        configurations,
        1e6 * measured,
        1e6 * predicted,
        measured / step,
        traffic / measured,
    )


def _prepare(d_in: int, tokens: int, edits: int, configurations: int) -> Callable[[], None]:
    capacity = max(1, edits * configurations)
    rows = RowPool([], capacity, d_in, "cuda")
    rows.W_enc.normal_(std=d_in**-0.5)
    rows.W_dec.normal_(std=d_in**-0.5)
    rows.params[:, [P_GAIN, P_DECODER_SCALE]] = 1.0
    rows.params[:, [P_GATE_BIAS, P_SINK]] = torch.inf
    table, facts = EditTable(configurations, "cuda"), SlotFacts(configurations, "cuda")
    for slot in range(configurations):
        used = range(slot * edits, (slot + 1) * edits)
        table.write(
            slot,
            [(i, PlannedEdit(0, row, OP_CLAMP, 1.0, 3, 0, POSITION_LIMIT))
             for i, row in enumerate(used)],
            list(used),
        )  # fmt: skip
        facts.write(slot, 10, None, True)
    hidden = torch.randn(tokens, d_in, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn_like(hidden)
    token_slot = (torch.arange(tokens, device="cuda") % configurations).int()
    if not edits:
        token_slot.fill_(NO_SLOT)
    buffers = Buffers(
        token_slot,
        positions=torch.arange(1, tokens + 1, device="cuda"),
        input_ids=torch.full((tokens,), 5, dtype=torch.int32, device="cuda"),
        is_special=torch.zeros(10, dtype=torch.bool, device="cuda"),
        slots=facts,
        table=table,
        reads=EditTable(configurations, "cuda"),
        gates=GateTable(configurations, "cuda"),
        gate_state=GateState(configurations, tokens, "cuda"),
        rows=rows,
        f=torch.empty(tokens, MAX_ENTRIES, device="cuda"),
        share=torch.empty(tokens, device="cuda"),
        carried=None,
        counters=torch.zeros(2, dtype=torch.int64, device="cuda"),
    )
    return partial(triton_kernel.steer_tokens, hidden, residual, buffers)


def _seconds(launch: Callable[[], None], device: Device) -> float:
    wiped = torch.empty(int(3 * device.l2_capacity), dtype=torch.uint8, device="cuda")
    launch()
    torch.cuda.synchronize()
    with_launch, without = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(with_launch):
        for _ in range(PAIRS):
            wiped.zero_()
            launch()
    with torch.cuda.graph(without):
        for _ in range(PAIRS):
            wiped.zero_()
    times: dict[torch.cuda.CUDAGraph, list[float]] = {with_launch: [], without: []}
    for repeat in range(REPEATS + 3):
        for graph, found in times.items():
            start, end = _event(), _event()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= 3:
                found.append(start.elapsed_time(end) / 1e3 / PAIRS)
    return statistics.median(times[with_launch]) - statistics.median(times[without])


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def this_device() -> Device:
    """The roofline's entry for the GPU at hand."""
    name = torch.cuda.get_device_name()
    for device in DEVICES:
        if device.name.split()[0] in name:
            return device
    known = ", ".join(device.name for device in DEVICES)
    raise SystemExit(f"no rates for {name!r}: tests/bench/roofline.py knows {known}")


def main() -> None:
    """Time every case, print the table, say whether the roofline holds."""
    parser = argparse.ArgumentParser(description="Time the kernel and check the roofline")
    parser.add_argument("out", nargs="?", type=Path, help="JSON file to write")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    device = this_device()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n"
    )
    print("| d_in | tokens | edits | configurations | measured, us | predicted, us | ratio | share "
          "of the step | GB/s |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    found = []
    for numbers in cases():
        case = measure(device, *numbers)
        found.append(case)
        print(
            f"| {case.d_in} | {case.tokens} | {case.edits} | {case.configurations} "
            f"| {case.measured_us:.1f} | {case.predicted_us:.1f} "
            f"| {case.measured_us / case.predicted_us:.2f} | {case.share:.2%} "
            f"| {case.bandwidth / 1e9:.0f} |",
            flush=True,
        )
        torch.cuda.empty_cache()
    if out is not None:
        out.write_text(json.dumps([asdict(case) for case in found], indent=1))
    over = [case for case in found if case.measured_us > ALLOWED * case.predicted_us]
    if over:
        print(f"\nrefuted: {len(over)} of {len(found)} cases over {ALLOWED} times the prediction")
        sys.exit(1)
    print(f"\nconfirmed: all {len(found)} cases within {ALLOWED} times the prediction")


if __name__ == "__main__":
    main()
