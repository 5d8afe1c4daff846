"""What an evaluation costs beside the prefills that it is made of.

``python -m tests.bench.studies [out.json] [--full] [--rounds N]``

An evaluation of N configurations runs every text N + 1 times. It is timed against as many plain
prefills of the same texts, eight in flight, which compute the output head for their last tokens
alone: what more it takes is the head at every scored position of both sides and the divergence of
the distributions. The shapes differ in how much of a text is scored. The noise of a study without a
control is a text that runs once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from steering.studies.registry import STUDIES
from steering.studies.study import Context
from steering.vllm.door import catalog_for
from steering.vllm.reader import OfflineReader, Run, Text
from steering.vllm.vocabulary import OfflineVocabulary
from tests.bench.alternate import Run as Timed
from tests.bench.alternate import alternate
from tests.bench.cases import SAE_NAME
from tests.bench.demo_engine import SAE, demo_engine, prompts
from tests.bench.record import Record, Rounds, add_clock, arguments, clock_of, spread
from tests.engine.engine import Engine

CONFIGURATIONS: Final = 4
TEXTS: Final = 4
CONTROL: Final = "plain prefills (control)"
FEATURE: Final = 1234

Clock = Callable[[], float]

ROUNDS: Final = Rounds(short=3, full=8)


@dataclass(frozen=True)
class Shape:
    """Tokens of each text."""

    name: str
    prompt: int
    completion: int


SHAPES: Final = (
    Shape("a quarter is scored", 144, 48),
    Shape("half is scored", 96, 96),
    Shape("nearly all is scored", 8, 184),
)


def body(shape: Shape) -> dict[str, Any]:
    """Texts of random tokens, and clamps of one feature each."""
    ids = prompts(TEXTS, shape.prompt + shape.completion)
    return {
        "texts": [
            {"prompt": text[: shape.prompt], "completion": text[shape.prompt :]} for text in ids
        ],
        "configurations": [
            {
                "name": f"clamp {i}",
                "steering": {
                    "interventions": [
                        {"sae": SAE_NAME, "feature": FEATURE + i, "op": "clamp", "value": 2.0}
                    ]
                },
            }
            for i in range(CONFIGURATIONS)
        ],
    }


def timed(engine: Engine, asked: Mapping[str, Any], clock: Clock) -> Timed:
    """One evaluation."""
    llm = engine.llm
    catalog = catalog_for(llm.llm_engine.vllm_config)
    context = Context(catalog, OfflineReader(llm), OfflineVocabulary(llm))
    started = clock()
    asyncio.run(STUDIES["evaluate"].run(context, asked))
    return Timed(clock() - started)


def prefilled(engine: Engine, texts: Sequence[Mapping[str, list[int]]], clock: Clock) -> Timed:
    """Every text as often as an evaluation runs it, and nothing scored."""
    runs = [
        Run.of(Text(tuple(text["prompt"]), tuple(text["completion"])), last_enters=False)
        for text in texts
        for _ in range(CONFIGURATIONS + 1)
    ]
    started = clock()
    asyncio.run(OfflineReader(engine.llm).all(runs))
    return Timed(clock() - started)


def main() -> None:
    """Start the engine, run every shape and write the JSON."""
    parser = arguments(__doc__)
    add_clock(parser)
    parser.add_argument("--only", help="the shape of this name alone")
    args, rounds = ROUNDS.parse(parser)
    record = Record(
        "studies",
        f"An evaluation of {CONFIGURATIONS} configurations on {TEXTS} texts of 192 tokens, beside "
        "as many plain prefills: medians (quartiles).",
        {"rounds": rounds, "configurations": CONFIGURATIONS, "texts": TEXTS},
    )
    engine = demo_engine({SAE_NAME: SAE}, eager=True)
    try:
        for shape in SHAPES:
            if args.only not in (None, shape.name):
                continue
            asked = body(shape)
            plain = partial(prefilled, engine, asked["texts"], clock_of(args))
            cases = {CONTROL: plain, "evaluate": partial(timed, engine, asked, clock_of(args))}
            for case, compared in alternate(plain, cases, rounds).items():
                ratio = spread([1 / one.throughput_ratio for one in compared])
                record.add(shape=shape.name, case=case, time_ratio=ratio)
                if case != CONTROL:
                    what = f"evaluate / (n + 1) plain prefills, {shape.name}"
                    record.target(what, ratio, 1.15, at_most=True)
    finally:
        engine.shut_down()
    record.save(args.json)


if __name__ == "__main__":
    main()
