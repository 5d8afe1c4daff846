"""What SAEs cost that nobody uses: an engine with the SAE loaded against one without.

``python -m tests.bench.idle [out.json] [--full] [--eager] [--rounds N]``

Both engines live in this process and take turns; none of the requests is steered. The control is
the engine without SAE against itself.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from tests.bench.alternate import alternate, ratios
from tests.bench.cases import REQUESTS, SAE_NAME, SHAPES
from tests.bench.demo_engine import SAE, demo_engine, prompts, run
from tests.bench.record import Record, Rounds, arguments

LOADED = "SAE loaded, unused"

ROUNDS: Final = Rounds(short=6, full=12)


def main() -> None:
    """Run both and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args, rounds = ROUNDS.parse(parser)
    memory = {"kv_cache_memory_bytes": 2**29}
    plain = demo_engine({}, eager=args.eager, **memory)
    loaded = demo_engine({SAE_NAME: SAE}, eager=args.eager, **memory)
    record = Record(
        "idle",
        "An SAE loaded and unused against none, 32 requests at once: medians (quartiles).",
        {"rounds": rounds, "requests": REQUESTS, "compiled": not args.eager},
    )
    for shape in SHAPES:
        batch = prompts(REQUESTS, shape.prompt)
        turn = partial(run, batch=batch, fields=[None] * REQUESTS, tokens=shape.generated)
        found = alternate(
            partial(turn, plain),
            {"no SAE (control)": partial(turn, plain), LOADED: partial(turn, loaded)},
            rounds,
        )
        for case, compared in found.items():
            record.add(shape=shape.name, case=case, **ratios(compared))
        ratio = ratios(found[LOADED])["throughput_ratio"]
        record.target(f"idle, {shape.name}: SAE loaded / no SAE", ratio, 0.995)
    for engine in (plain, loaded):
        engine.shut_down()
    record.save(args.json)


if __name__ == "__main__":
    main()
