"""The op alone: one hook point's pass over tokens x edits x configurations x width of the stream.

``python -m tests.bench.op_alone [out.json] [--full]``; the short set has width 576 only.

Up to 256 tokens stand for a decode step, one token a request; its batch stays the same from pass
to pass, as it does while requests generate. More stand for a prefill, as many requests as
configurations; it is laid out anew every pass, since no chunk comes twice. All edits are clamps of
JumpReLU features and cover every token, and every SAE has a sink norm. Times are those of the
processor in one thread: what else runs on a shared machine takes no part in them.
"""

from __future__ import annotations

from time import thread_time
from typing import Final

import torch

from steering.batch_parts import SlotWork
from steering.hook import Counters, HookRuntime
from steering.plan import COVERS_GENERATION, COVERS_PROMPT, OP_CLAMP, PlannedEdit, SteeringPlan
from steering.rows import P_DECODER_SCALE, P_GAIN, P_GATE_BIAS, P_SINK, P_THRESHOLD, RowPool
from steering.slots import EditTable
from steering.spec import POSITION_LIMIT
from steering.step import Step
from tests.bench.record import Plot, Record, arguments, spread

DECODE: Final = 256
SECONDS: Final = 0.4  # of measurement for each case, at least three passes
VOCAB_SIZE: Final = 1000


class Case:
    """A hook point with its requests, and a pass over them."""

    def __init__(self, tokens: int, edits: int, configurations: int, d_in: int) -> None:
        torch.manual_seed(0)
        self.fresh = tokens > DECODE
        requests = configurations if self.fresh else tokens
        rows = RowPool([], configurations * edits, d_in, "cpu")
        rows.W_enc.normal_()
        rows.W_dec.normal_()
        for column, value in (
            (P_GAIN, 1.0),
            (P_THRESHOLD, 1.0),
            (P_DECODER_SCALE, 1.0),
            (P_GATE_BIAS, torch.inf),
            (P_SINK, 1e6),
        ):
            rows.params[:, column] = value
        table = EditTable(requests + 1, "cpu")
        is_special = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        prompt_len = torch.full((requests,), 100, dtype=torch.int32)
        self.hook = HookRuntime({}, rows, table, is_special, prompt_len, Counters())
        for slot in range(requests):
            first = slot % configurations * edits
            planned = [
                PlannedEdit(0, row, OP_CLAMP, 5.0, COVERS_PROMPT | COVERS_GENERATION, 0,
                            POSITION_LIMIT)
                for row in range(first, first + edits)
            ]  # fmt: skip
            table.write(slot, planned, range(first, first + edits))
            plan = SteeringPlan("k", 1, 100, tuple(planned), True, False, None)
            self.hook.work[slot] = SlotWork(list(enumerate(planned)), frozenset(), None, plan, None)
        self.step = Step(
            tokens,
            torch.full((tokens,), 100),
            torch.full((tokens,), 50, dtype=torch.int32),
            "cpu",
        )
        self.slots = range(requests)
        self.starts = torch.linspace(0, tokens, requests + 1).long().numpy()
        self.hidden = torch.randn(tokens, d_in)
        self.residual = torch.randn(tokens, d_in)

    def seconds(self) -> float:
        """Of the processor in one pass, the step's layout included."""
        if self.fresh:
            self.hook.clear_slot(len(self.slots))  # an empty one; what was laid out is forgotten
        started = thread_time()
        self.step.begin(self.slots, self.starts)
        self.hook.apply(self.hidden, self.residual, self.step)
        self.step.end()
        return thread_time() - started


def main() -> None:
    """Time every case, round after round, and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="widths up to 8192, 256 configurations")
    args = parser.parse_args()
    record = Record(
        "op_alone",
        "One pass of the op at one hook point: median milliseconds (quartiles).",
        {"threads": 1, "dtype": "float32"},
        Plot(x="configurations", y="milliseconds", series="tokens, edits, d_in", log_y=True),
    )
    torch.set_num_threads(1)
    widths = (576, 2304, 8192) if args.full else (576,)
    tokens = (1, 32, 256, 2048) if args.full else (32, 2048)
    configurations = (1, 8, 32, 256) if args.full else (1, 8, 32)
    for d_in in widths:
        for n in tokens:
            for edits in (1, 8, 64):
                for k in configurations:
                    if k > n:
                        continue
                    case = Case(n, edits, k, d_in)
                    case.seconds()
                    times: list[float] = []
                    while len(times) < 3 or (sum(times) < SECONDS and len(times) < 500):
                        times.append(case.seconds())
                    record.add(
                        tokens=n,
                        edits=edits,
                        configurations=k,
                        d_in=d_in,
                        milliseconds=spread([1e3 * t for t in times]),
                    )
    record.save(args.json)


if __name__ == "__main__":
    main()
