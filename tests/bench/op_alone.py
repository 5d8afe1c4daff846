"""The op alone: one hook point's pass over tokens x edits x configurations x width of the stream.

``python -m tests.bench.op_alone [out.json] [--full]``; the short set has width 576 only.

Up to 256 tokens stand for a decode step, one token a request; its batch stays the same from pass
to pass, as it does while requests generate. More stand for a prefill, as many requests as
configurations; it is laid out anew every pass, since no chunk comes twice. All edits are clamps of
JumpReLU features and cover every token, and every SAE has a sink norm. Every pass starts from the
same stream, which, as behind a real layer, was written just before. "Cold" passes come after
64 MiB of something else went through the caches, as the model's weights do between two passes of
an engine; warm ones follow each other. Eight edits with eight conditions, solved ones and ones with
a limit to their share stand beside plain ones, turn by turn. Times are those of the processor in
one thread: what else runs on a shared machine takes no part in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import thread_time
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from steering.request.limits import POSITION_LIMIT
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    GATE_ABOVE,
    OP_CLAMP,
    SCOPE_SO_FAR,
    PlannedEdit,
    PlannedGate,
)
from steering.worker.gates import GateState, GateTable
from steering.worker.ops import cpu_kernel
from steering.worker.ops.buffers import Buffers
from steering.worker.ops.layout import (
    MAX_ENTRIES,
    P_DECODER_SCALE,
    P_GAIN,
    P_GATE_BIAS,
    P_SINK,
    P_THRESHOLD,
)
from steering.worker.pass_reports import PassReports
from steering.worker.residency import Residency
from steering.worker.rows import RowPool
from steering.worker.site import Site
from steering.worker.slots import EditTable, SlotFacts
from steering.worker.step import Step
from steering.worker.whole_outputs import WholeOutputs
from tests.bench.record import Plot, Record, arguments, spread

DECODE: Final = 256
SECONDS: Final = 0.2  # of measurement for each case, at least three passes
VOCAB_SIZE: Final = 1000
EVICTING_BYTES: Final = 64 * 2**20


@dataclass(frozen=True)
class Kind:
    """What the requests ask for beside their edits.

    Attributes:
        gates: conditions, each on a feature of an edit; every edit waits for all of them.
        reread: edits are solved.
        max_share: a limit, never reached.
    """

    gates: int = 0
    reread: bool = False
    max_share: bool = False


PLAIN: Final = Kind()
#: Beside eight plain edits, in alternation.
KINDS: Final = {
    "eight conditions": Kind(gates=8),
    "reread": Kind(reread=True),
    "max_share": Kind(max_share=True),
}


class Case:
    """A hook point with its requests, and a pass over them."""

    def __init__(
        self, tokens: int, edits: int, configurations: int, d_in: int, kind: Kind = PLAIN
    ) -> None:
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
        slots, table = SlotFacts(requests + 1, "cpu"), EditTable(requests + 1, "cpu")
        gates, state = GateTable(requests + 1, "cpu"), GateState(requests + 1, tokens, "cpu")
        self.touched = torch.zeros(2, dtype=torch.int64)
        self.step = Step(
            tokens,
            torch.full((tokens,), 100),
            torch.full((tokens,), 50, dtype=torch.int32),
            "cpu",
        )
        buffers = Buffers(
            token_slot=self.step.token_slot,
            positions=self.step.positions,
            input_ids=self.step.input_ids,
            is_special=torch.zeros(VOCAB_SIZE, dtype=torch.bool),
            slots=slots,
            table=table,
            reads=EditTable(requests + 1, "cpu"),
            gates=gates,
            gate_state=state,
            rows=rows,
            f=torch.zeros(tokens, MAX_ENTRIES),
            share=torch.zeros(tokens),
            carried=None,
            counters=self.touched,
        )
        nowhere = Residency({}, rows.W_enc.device, None)
        kernel = cpu_kernel.bound(buffers)
        # All that is asked of it: that it reads and writes here.
        sae: Any = SimpleNamespace(card=SimpleNamespace(one_place=True))
        self.site = Site(
            "blocks.0.hook_resid_post", {0: sae}, {0: sae}, buffers, nowhere, PassReports(),
            WholeOutputs(), kernel, graphs=kind.gates > 0,
        )  # fmt: skip
        everywhere = COVERS_PROMPT | COVERS_GENERATION
        for slot in range(requests):
            first = slot % configurations * edits
            planned = [
                PlannedEdit(0, row, OP_CLAMP, 5.0, everywhere, 0, POSITION_LIMIT,
                            2**kind.gates - 1)
                for row in range(first, first + edits)
            ]  # fmt: skip
            conditions = [
                PlannedGate(0, first + i % edits, GATE_ABOVE, -1.0, SCOPE_SO_FAR)
                for i in range(kind.gates)
            ]
            table.write(
                slot, list(enumerate(planned)), range(first, first + edits), reread=kind.reread
            )
            gates.write(slot, list(enumerate(conditions)), [gate.latent for gate in conditions])
            state.write(slot, conditions, None)
            slots.write(slot, 100, 1e6 if kind.max_share else None, False)
        self.slots = range(requests)
        self.starts = torch.linspace(0, tokens, requests + 1).long().numpy()
        self.stream = torch.randn(tokens, d_in)
        self.hidden = torch.empty_like(self.stream)
        self.residual = torch.randn(tokens, d_in)

    def seconds(self, evict: Tensor | None = None) -> float:
        """Of the processor in one pass, the step's layout included.

        Args:
            evict: what goes through the caches before.
        """
        if self.fresh:
            self.step.end(wipe=True)  # what was laid out is forgotten
        # Edits of edits would grow until every token is a sink, and nothing more is edited.
        if evict is not None:
            evict.add_(1)
        self.hidden.copy_(self.stream)
        started = thread_time()
        self.step.begin(self.slots, self.starts)
        self.site.apply(self.hidden, self.residual, self.step)
        self.step.end()
        return thread_time() - started


def times(case: Case, evict: Tensor | None) -> list[float]:
    """Seconds of passes of one kind, after one that does not count."""
    case.seconds(evict)
    found: list[float] = []
    while len(found) < 3 or (sum(found) < SECONDS and len(found) < 40):
        found.append(case.seconds(evict))
    return found


def main() -> None:
    """Time every case, round after round, and write the JSON."""
    args = arguments(__doc__).parse_args()
    widths = (576, 2304, 8192) if args.full else (576,)
    record = Record(
        "op_alone",
        "One pass of the op at one hook point: median milliseconds (quartiles).",
        {"threads": 1, "dtype": "float32"},
        Plot(
            x="configurations",
            y="cold_milliseconds",
            series="tokens, edits",
            log_y=True,
            where={"d_in": widths[0]},
        ),
    )
    torch.set_num_threads(1)
    evict = torch.zeros(EVICTING_BYTES // 4)
    tokens = (1, 32, 256, 2048) if args.full else (32, 2048)
    configurations = (1, 8, 32, 256) if args.full else (1, 8, 32)
    for d_in in widths:
        for n in tokens:
            for edits in (1, 8, 64):
                for k in configurations:
                    if k > n:
                        continue
                    case = Case(n, edits, k, d_in)
                    warm, cold = times(case, None), times(case, evict)
                    passes = 2 + len(warm) + len(cold)
                    assert int(case.touched[0]) == n * passes, "not every token edited"
                    record.add(
                        tokens=n,
                        edits=edits,
                        configurations=k,
                        d_in=d_in,
                        cold_milliseconds=spread([1e3 * t for t in cold]),
                        warm_milliseconds=spread([1e3 * t for t in warm]),
                    )
    for name, kind in KINDS.items():
        for n in tokens:
            plain, other = (Case(n, 8, 1, 576, k) for k in (PLAIN, kind))
            ratios = [other.seconds(evict) / plain.seconds(evict) for _ in range(40)][1:]
            record.add(tokens=n, edits=8, configurations=1, d_in=576, beside=name,
                       ratio_to_plain=spread(ratios))  # fmt: skip
    record.save(args.json)


if __name__ == "__main__":
    main()
