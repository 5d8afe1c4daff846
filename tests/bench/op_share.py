"""The op's share of a step: time in the op, and around it, against the whole forward step.

``python -m tests.bench.op_share [out.json] [--full] [--eager]``

32 requests with 32 configurations, in one engine. A decode step has one token of each; the prefill
is one step of 2,048 tokens. Each step is timed on its own, so medians leave out those that
something else on the machine delayed. A step is the worker's forward pass, without scheduling and
sampling, so of the engine's whole step the shares are smaller still. "op" is the edit itself;
"host" is all that steering adds to the worker outside of it: following requests, laying out the
step, collecting reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from tests.bench.cases import DECODE, REQUESTS, SAE_NAME, SHAPES, steering
from tests.bench.demo_engine import SAE, demo_engine, prompts, run
from tests.bench.record import Record, arguments, spread
from tests.engine.engine import Engine


@dataclass
class Stopwatch:
    """Adds up the time spent in the functions that it wraps, and notes each step's share.

    Attributes:
        steps: ``(tokens, seconds of the step, in the op, in the host's part)``.
    """

    steps: list[tuple[int, float, float, float]] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=lambda: {"op": 0.0, "host": 0.0})

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time added to ``part``."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[part] += perf_counter() - started

        return wrapped

    def attach(self, engine: Engine) -> None:
        """Time an engine's steps and the steering in them."""
        state = engine.state
        for name in ("add_request", "remove_request", "begin_step", "end_step", "needs_full"):
            setattr(state, name, self.timed("host", getattr(state, name)))
        state.apply_at = self.timed("op", state.apply_at)
        worker = engine.worker
        execute = worker.execute_model

        def execute_model(scheduler_output: Any) -> Any:
            self.spent.update(op=0.0, host=0.0)
            started = perf_counter()
            output = execute(scheduler_output)
            seconds = perf_counter() - started
            tokens = scheduler_output.total_num_scheduled_tokens
            self.steps.append((tokens, seconds, self.spent["op"], self.spent["host"]))
            return output

        worker.execute_model = execute_model


def main() -> None:
    """Run both kinds of step and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    engine = demo_engine({SAE_NAME: SAE}, eager=args.eager)
    watch = Stopwatch()
    watch.attach(engine)
    record = Record(
        "op_share",
        "Steering's share of one forward step of the engine, percent: medians (quartiles).",
        {"requests": REQUESTS, "configurations": REQUESTS, "compiled": not args.eager},
    )
    for shape in SHAPES:
        decode = shape == DECODE
        batch = prompts(REQUESTS, shape.prompt)
        wanted = REQUESTS * (1 if decode else shape.prompt)
        for edits in (1, 8, 64) if args.full else (8, 64):
            fields = steering(REQUESTS, edits)
            run(engine, batch, fields, shape.generated)
            watch.steps.clear()
            for _ in range((2 if decode else 6) * (2 if args.full else 1)):
                run(engine, batch, fields, shape.generated)
            steps = [step for step in watch.steps if step[0] == wanted]
            op = spread([100 * op / seconds for _, seconds, op, _ in steps])
            record.add(
                shape=shape.name,
                edits=edits,
                steps=len(steps),
                step_milliseconds=spread([1e3 * seconds for _, seconds, _, _ in steps]),
                op_milliseconds=spread([1e3 * op for _, _, op, _ in steps]),
                op_percent=op,
                host_percent=spread([100 * host / seconds for _, seconds, _, host in steps]),
            )
            if edits == 8:
                what = f"op's share of a {shape.name} step of {wanted:,} tokens, percent"
                record.target(what, op, 0.5 if decode else 1.0, at_most=True)
    engine.shut_down()
    record.save(args.json)


if __name__ == "__main__":
    main()
