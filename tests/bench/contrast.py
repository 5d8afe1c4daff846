"""What a contrast of two sets of texts costs beside the prefills and the encode it is made of.

``python -m tests.bench.contrast [out.json] [--full] [--rounds N]``

It is timed against plain prefills of the same texts, eight in flight, and one encode of as many
streams by the same SAE, in blocks as large as the texts that share a pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch

from steering.studies.registry import STUDIES
from steering.studies.study import Context
from steering.vllm.door import catalog_for
from steering.vllm.reader import IN_FLIGHT, OfflineReader, Run, Text
from steering.vllm.vocabulary import OfflineVocabulary
from tests.bench.alternate import Run as Timed
from tests.bench.alternate import alternate
from tests.bench.cases import SAE_NAME
from tests.bench.demo_engine import D_MODEL, SAE, demo_engine, prompts
from tests.bench.record import Record, Rounds, add_clock, arguments, clock_of, spread
from tests.engine.engine import Engine

TEXTS: Final = 128  # of either side
TOKENS: Final = 64
Clock = Callable[[], float]

CONTROL: Final = "prefills and one encode (control)"

ROUNDS: Final = Rounds(short=3, full=8)


def context_of(engine: Engine) -> Context:
    """A study's."""
    llm = engine.llm
    catalog = catalog_for(llm.llm_engine.vllm_config)
    return Context(catalog, OfflineReader(llm), OfflineVocabulary(llm))


def contrasted(engine: Engine, asked: Mapping[str, Any], clock: Clock) -> Timed:
    """One contrast, from the body to the answer."""
    context = context_of(engine)
    started = clock()
    asyncio.run(STUDIES["contrast"].run(context, asked, SAE_NAME))
    return Timed(clock() - started)


def prefilled_and_encoded(engine: Engine, texts: Sequence[Sequence[int]], clock: Clock) -> Timed:
    """Every text through the model, and as many streams through the encoder."""
    sae = context_of(engine).catalog.sae(SAE_NAME)
    streams = torch.randn(IN_FLIGHT * TOKENS, D_MODEL)
    started = clock()
    asyncio.run(OfflineReader(engine.llm).all(Run.of(Text(tuple(text))) for text in texts))
    with torch.inference_mode():
        for _ in range(len(texts) // IN_FLIGHT):
            sae.encode(streams)
    return Timed(clock() - started)


def main() -> None:
    """Start the engine, compare and write the JSON."""
    parser = arguments(__doc__)
    add_clock(parser)
    args, rounds = ROUNDS.parse(parser)
    record = Record(
        "contrast",
        f"A contrast of 2 x {TEXTS} texts of {TOKENS} tokens, beside plain prefills of them and "
        "one encode: medians (quartiles).",
        {"rounds": rounds, "texts": 2 * TEXTS, "tokens": TOKENS},
    )
    texts = prompts(2 * TEXTS, TOKENS)
    asked = {
        name: [{"prompt": text} for text in side]
        for name, side in (("positive", texts[:TEXTS]), ("negative", texts[TEXTS:]))
    }
    engine = demo_engine({SAE_NAME: SAE}, eager=True)
    try:
        plain = partial(prefilled_and_encoded, engine, texts, clock_of(args))
        cases = {CONTROL: plain, "contrast": partial(contrasted, engine, asked, clock_of(args))}
        for case, compared in alternate(plain, cases, rounds).items():
            ratio = spread([1 / one.throughput_ratio for one in compared])
            record.add(case=case, time_ratio=ratio)
            if case != CONTROL:
                record.target("contrast / (prefills + one encode)", ratio, 1.2, at_most=True)
    finally:
        engine.shut_down()
    record.save(args.json)


if __name__ == "__main__":
    main()
