"""Time the kernels on a GPU and hold them against the roofline: confirmed or refuted.

``python -m tests.bench.kernel_gpu [out.json] [--rehearse]`` on a machine with a GPU. Exit status 1
if some case takes over ``ALLOWED`` times what ``tests/bench/roofline.py`` predicts of an A100,
H100, H200 or B200; the times of others stand beside an H100's, and there is no verdict.

Each launch finds a cold L2, as in a decode step, which streams the model's weights between two
hooks: a CUDA graph of (wipe L2, launch) pairs is timed against one of wipes alone, the two in
alternation, and the medians are subtracted. ``--rehearse`` goes through one small case of each
kernel on a CPU, where TRITON_INTERPRET=1 stands in for a compiler; its times mean nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import triton

from steering.request.limits import MAX_GATES, MAX_INTERVENTIONS, POSITION_LIMIT
from steering.request.plan import GATE_ABOVE, OP_CLAMP, SCOPE_TOKEN, PlannedEdit, PlannedGate
from steering.worker.gates import GateState, GateTable
from steering.worker.ops import triton_kernel
from steering.worker.ops.buffers import Buffers
from steering.worker.ops.layout import (
    MAX_ENTRIES,
    NEVER,
    NO_SLOT,
    P_DECODER_SCALE,
    P_GAIN,
    P_GATE_BIAS,
    P_SINK,
)
from steering.worker.rows import RowPool
from steering.worker.slots import EditTable, SlotFacts
from tests.bench.record import Record, arguments
from tests.bench.roofline import (
    H100,
    LLAMA_8B,
    LLAMA_70B,
    Device,
    Moved,
    decode_seconds,
    device_named,
    gate_seconds,
    idle_seconds,
    moved,
    moved_by_gates,
    moved_by_reads,
    moved_by_writes,
    op_seconds,
    prefill_seconds,
    read_seconds,
    write_seconds,
)

ALLOWED: Final = 1.5
PAIRS: Final = 10
REPEATS: Final = 30
MODELS: Final = {4096: LLAMA_8B, 8192: LLAMA_70B}

EDIT, GATES, READS, WRITES = "edit", "gates", "reads", "writes"
#: Seconds and bytes by kernel; of the halves without a residual, as an MLP's output has none.
PREDICTED: Final[dict[str, tuple[Callable[..., float], Callable[..., Moved]]]] = {
    EDIT: (op_seconds, moved),
    GATES: (gate_seconds, moved_by_gates),
    READS: (read_seconds, moved_by_reads),
    WRITES: (write_seconds, moved_by_writes),
}


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        kernel: of `PREDICTED`.
        d_in: width of the stream, bfloat16.
        tokens: of the pass.
        entries: edits, or conditions, of every token; 0 where no token has a slot.
        configurations: distinct lists of them, each with rows of its own.
    """

    kernel: str
    d_in: int
    tokens: int
    entries: int
    configurations: int


def cases() -> Iterator[Case]:
    """All of a GPU's."""
    for d_in in MODELS:
        for tokens in (1, 32, 256, 2048):
            yield Case(EDIT, d_in, tokens, 0, 1)
            distinct = sorted({1, min(tokens, 256)})
            for edits in (1, 8, MAX_INTERVENTIONS):
                yield from (Case(EDIT, d_in, tokens, edits, k) for k in distinct)
            for kernel in (GATES, READS, WRITES):
                yield from (Case(kernel, d_in, tokens, 8, k) for k in distinct)


def rehearsed() -> Iterator[Case]:
    """One of each kernel."""
    yield Case(EDIT, 24, 2, 0, 1)
    yield from (Case(kernel, 24, 2, 3, 2) for kernel in PREDICTED)


def measure(device: Device, case: Case, clock: Callable[..., float]) -> dict[str, Any]:
    """Time one case.

    Returns:
        the case; what was measured and predicted in microseconds and the ratio of the two; the
        share of the step that these tokens make (decode up to 256 at a context of 1,024, prefill
        above); bytes a second that the kernel moved, L2 hits included.
    """
    where = "cuda" if clock is _seconds else "cpu"
    measured = clock(_prepare(case, where), device)
    seconds, bytes_of = PREDICTED[case.kernel]
    if case.entries:
        predicted = seconds(device, case.d_in, 2, case.tokens, case.entries, case.configurations)
        one = bytes_of(case.d_in, 2, case.entries)
        traffic = case.tokens * (one.minimum + one.metadata)
    else:
        predicted = idle_seconds(device, case.d_in, 2, case.tokens)
        traffic = 4 * case.tokens
    model = MODELS.get(case.d_in, LLAMA_8B)
    step = (
        decode_seconds(device, model, case.tokens, 1024)
        if case.tokens <= 256
        else prefill_seconds(device, model, case.tokens)
    )
    return {
        **vars(case),
        "measured_us": 1e6 * measured,
        "predicted_us": 1e6 * predicted,
        "ratio": measured / predicted,
        "percent_of_step": 100 * measured / step,
        "gigabytes_a_second": traffic / max(measured, 1e-9) / 1e9,
    }


def _prepare(case: Case, where: str) -> Callable[[], None]:
    """The launch, of tokens that all have every entry."""
    tokens, entries, slots = case.tokens, case.entries, case.configurations
    rows = RowPool([], max(1, entries * slots), case.d_in, where)
    rows.W_enc.normal_(std=case.d_in**-0.5)
    rows.W_dec.normal_(std=case.d_in**-0.5)
    rows.params[:, [P_GAIN, P_DECODER_SCALE]] = 1.0
    rows.params[:, [P_GATE_BIAS, P_SINK]] = torch.inf
    table, reads, facts = EditTable(slots, where), EditTable(slots, where), SlotFacts(slots, where)
    gates, state = GateTable(slots, where), GateState(slots, tokens, where)
    for slot in range(slots):
        facts.write(slot, 10, None, True)
        own = range(slot * entries, (slot + 1) * entries)
        edits = [PlannedEdit(0, row, OP_CLAMP, 1.0, 3, 0, POSITION_LIMIT) for row in own]
        if case.kernel == GATES:
            conditions = [PlannedGate(0, row, GATE_ABOVE, 0.0, SCOPE_TOKEN) for row in own]
            gates.write(slot, [*enumerate(conditions)], list(own))
            state.write(slot, conditions, torch.full((MAX_GATES,), NEVER, dtype=torch.int32))
        elif case.kernel == READS:
            reads.write(slot, [*enumerate(edits)], list(own))
        else:
            carried = range(entries) if case.kernel == WRITES else ()
            table.write(slot, [*enumerate(edits)], list(own), carried=carried)
    hidden = torch.randn(tokens, case.d_in, device=where, dtype=torch.bfloat16)
    split = case.kernel in (READS, WRITES)
    residual = None if split else torch.randn_like(hidden)
    token_slot = (torch.arange(tokens, device=where) % slots).int()
    if not entries:
        token_slot.fill_(NO_SLOT)
    buffers = Buffers(
        token_slot,
        positions=torch.arange(1, tokens + 1, device=where),
        input_ids=torch.full((tokens,), 5, dtype=torch.int32, device=where),
        is_special=torch.zeros(10, dtype=torch.bool, device=where),
        slots=facts,
        table=table,
        reads=reads,
        gates=gates,
        gate_state=state,
        rows=rows,
        f=torch.empty(tokens, MAX_ENTRIES, device=where),
        share=torch.empty(tokens, device=where),
        carried=torch.randn(tokens, MAX_INTERVENTIONS, device=where) if split else None,
        counters=torch.zeros(2, dtype=torch.int64, device=where),
    )
    kernel = triton_kernel.bound(buffers)
    launch = {GATES: kernel.read_gates, READS: kernel.read_edits}.get(case.kernel, kernel.steer)
    return partial(launch, hidden, residual)


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


def this_device() -> Device | None:
    """The roofline's entry for the GPU at hand, if it has one."""
    return device_named(torch.cuda.get_device_name())


def _seconds_on_cpu(launch: Callable[[], None], _: Device) -> float:
    started = time.perf_counter()
    launch()
    return time.perf_counter() - started


def main() -> None:
    """Time every case, write them, say whether the roofline holds."""
    parser = arguments(__doc__)
    parser.add_argument("--rehearse", action="store_true", help="a CPU's small cases")
    args = parser.parse_args()
    if not (args.rehearse or torch.cuda.is_available()):
        raise SystemExit("no CUDA device")
    known = None if args.rehearse else this_device()
    device = known or H100
    name = "a CPU" if args.rehearse else torch.cuda.get_device_name()
    record = Record(
        "kernel_gpu",
        f"Kernels on {name} beside what is predicted of {device.name}; L2 is cold.",
        {"allowed": ALLOWED, "triton": triton.__version__, "rehearsal": args.rehearse},
    )
    clock = _seconds_on_cpu if args.rehearse else _seconds
    with record.saved(args.json):
        for case in rehearsed() if args.rehearse else cases():
            record.add(**measure(device, case, clock))
            if not args.rehearse:
                torch.cuda.empty_cache()
    over = [one for one in record.results if one["ratio"] > ALLOWED]
    if known is None:
        print(f"no rates of {name} are known: nothing is confirmed or refuted")
    elif over:
        print(f"refuted: {len(over)} of {len(record.results)} cases over {ALLOWED} x predicted")
        sys.exit(1)
    else:
        print(f"confirmed: all {len(record.results)} cases within {ALLOWED} x predicted")


if __name__ == "__main__":
    main()
