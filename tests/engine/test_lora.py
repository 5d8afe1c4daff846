"""LoRA adapters beside steering: steered and unsteered requests with an adapter and without."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from steering.request.accepted import accept
from steering.studies.comparison import Side
from steering.studies.scoring import Scorer
from steering.vllm.door import catalog_for
from steering.vllm.reader import OfflineReader
from tests.engine.adapters import RANK, make_adapter
from tests.engine.engine import SPECIAL_TOKEN_IDS, Engine, tiny_engine
from tests.engine.reference import ReferenceModel, ReferenceSAE
from tests.models import NUM_LAYERS

PROMPT: Final = [1, 70, 81, 92, 103, 114, 125]
STEERING: Final[dict[str, Any]] = {
    "interventions": [
        {"sae": "a", "feature": 5, "op": "clamp", "value": 6},
        {"sae": "b", "feature": 9, "op": "clamp", "value": -4},
    ],
    "report": True,
}
TOLERANCE: Final = 1e-3


@dataclass
class Served:
    """An engine that serves an adapter, and the references with and without it."""

    engine: Engine
    adapter: Path
    plain: ReferenceModel
    adapted: ReferenceModel
    saes: dict[str, ReferenceSAE]


@pytest.fixture(scope="module")
def served(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("lora")
    plain, adapted = (ReferenceModel(tiny_model("llama"), SPECIAL_TOKEN_IDS) for _ in range(2))
    assert len(adapted.layers) == NUM_LAYERS
    adapter = make_adapter(adapted, folder / "adapter")
    saes = ({"architecture": "jumprelu"}, {"hook_kind": "hook_mlp_out", "seed": 1})
    engine = tiny_engine(
        tiny_model("llama"), folder, saes, enable_lora=True, max_lora_rank=RANK, max_loras=1
    )
    references = {name: ReferenceSAE(path) for name, path in engine.saes.items()}
    yield Served(engine, adapter, plain, adapted, references)
    engine.shut_down()


@pytest.mark.parametrize("with_adapter", [False, True], ids=["plain", "adapter"])
def test_edits_act_with_an_adapter_and_without(served: Served, with_adapter: bool) -> None:
    from vllm.lora.request import LoRARequest

    # Never both in one batch: there vLLM's CPU build lets the adapter into the plain request
    # (5 nats off, also without an SAE).
    adapter = LoRARequest("adapter", 1, str(served.adapter)) if with_adapter else None
    reference = served.adapted if with_adapter else served.plain
    fields = [None, STEERING, None, STEERING]
    answers = served.engine.generate([PROMPT] * 4, fields, lora=[adapter] * 4)
    for field, answer in zip(fields, answers, strict=True):
        expected = reference.logprobs(PROMPT, answer.tokens, served.saes, field)
        own = [float(row[token]) for row, token in zip(expected, answer.tokens, strict=True)]
        assert answer.logprobs == pytest.approx(own, abs=TOLERANCE), field
        if field is not None:
            edited = [entry["tokens_edited"] for entry in answer.steering[0].interventions]
            assert edited == [len(PROMPT) - 1 + len(answer.tokens) - 1] * 2
    assert answers[0].logprobs != answers[1].logprobs


def test_text_is_scored_without_the_adapter_that_ran_before(served: Served) -> None:
    from vllm.lora.request import LoRARequest

    text = tuple(range(20, 60))
    catalog = catalog_for(served.engine.llm.llm_engine.vllm_config)
    side = Side(tuple(PROMPT), text, accept(STEERING, catalog))
    adapter = LoRARequest("adapter", 1, str(served.adapter))
    served.engine.generate([PROMPT], [None], lora=[adapter])
    scorer = Scorer(OfflineReader(served.engine.llm))
    (found,) = asyncio.run(scorer.log_probabilities([side]))
    expected = served.plain.logprobs(PROMPT, text, served.saes, STEERING)
    own = [float(row[token]) for row, token in zip(expected, text, strict=True)]
    assert found.tolist() == pytest.approx(own, abs=TOLERANCE)
