"""An engine whose texts are scored, and the reference of its model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from steering.request.accepted import Accepted, accept
from steering.studies.comparison import Comparison, Side
from steering.studies.figures import Figures
from steering.studies.scoring import Scorer
from steering.vllm.door import catalog_for
from steering.vllm.reader import OfflineReader
from tests.engine.engine import SPECIAL_TOKEN_IDS, Engine, tiny_engine
from tests.engine.reference import ReferenceModel, ReferenceSAE
from tests.models import make_tiny_model

#: In nats; transformers and vLLM round differently.
TOLERANCE = 3e-5


SAES: tuple[dict[str, Any], ...] = (
    {"architecture": "standard", "layer": 1},
    {"architecture": "standard", "layer": 2, "seed": 1},
)

WATCHED = (11, 70, 200)


class Scored:
    """An engine, and the reference of its model."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.reader = OfflineReader(engine.llm)
        self.scorer = Scorer(self.reader)
        self.model = ReferenceModel(engine.model, SPECIAL_TOKEN_IDS)
        self.saes = {name: ReferenceSAE(path) for name, path in engine.saes.items()}

    def accepted(self, field: Mapping[str, Any] | None) -> Accepted | None:
        config = self.engine.llm.llm_engine.vllm_config
        return None if field is None else accept(dict(field), catalog_for(config))

    def sides(
        self, fields: Sequence[Mapping[str, Any]], prompt: Sequence[int], text: Sequence[int]
    ) -> list[tuple[Side, Sequence[int]]]:
        of_each = (Side(tuple(prompt), tuple(text), self.accepted(field)) for field in fields)
        return [(side, WATCHED) for side in of_each]

    def compared(self, comparison: Comparison) -> list[Figures]:
        return self.all_compared([comparison])[0]

    def all_compared(self, comparisons: Sequence[Comparison]) -> list[list[Figures]]:
        async def run() -> dict[tuple[int, int], Figures]:
            async with aclosing(self.scorer.compare_all(comparisons)) as found:
                return {(place, side): figures async for place, side, figures in found}

        found = asyncio.run(run())
        return [
            [found[i, j] for j in range(len(comparison.steered))]
            for i, comparison in enumerate(comparisons)
        ]

    def reference(
        self, prompt: Sequence[int], text: Sequence[int], field: Mapping[str, Any] | None
    ) -> Tensor:
        """``[n, vocabulary]`` log p of what predicts each token of ``text``."""
        return self.model.logprobs(prompt, text, self.saes, field).double()

    @property
    def held(self) -> int:
        """What the worker keeps."""
        return len(self.engine.state.captures)


@contextmanager
def scored_engine(folder: Path, **engine_args: Any) -> Iterator[Scored]:
    """A tiny Llama with `SAES`, shut down at the end."""
    engine = tiny_engine(make_tiny_model(folder / "llama", "llama"), folder, SAES, **engine_args)
    try:
        yield Scored(engine)
    finally:
        engine.shut_down()
