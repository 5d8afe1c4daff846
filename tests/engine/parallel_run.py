"""What is answered with one, or several, worker processes.

Several are run as a script by the tests of tensor and pipeline parallelism, which prints one JSON
line: worker processes import the main module, so it cannot be a test file.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from steering.request.accepted import accept
from steering.request.probe import EVERY_TOKEN, Pool
from steering.studies.changes import Changes
from steering.studies.comparison import Side
from steering.studies.figures import Figures
from steering.studies.reading import Pooled, pooled
from steering.studies.scoring import Scorer
from steering.vllm.door import catalog_for
from steering.vllm.reader import OfflineReader, Text

#: Of the tiny Llama: four of 32.
WIDTH_OF_HEADS: Final = 128
#: What makes a tiny SAE's files those of a transcoder, as SAELens has them.
TRANSCODER: Final = {
    "architecture": "jumprelu_transcoder",
    "d_out": 64,
    "apply_b_dec_to_input": False,
}
PLACES: Final = {
    "hook_name": "blocks.1.ln2.hook_normalized",
    "hook_name_out": "blocks.1.hook_mlp_out",
}


def main() -> None:
    """Arguments: model folder, scratch folder, JSON of extra engine arguments."""
    answers = run(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    print("RESULT " + json.dumps(answers), flush=True)


def run(model: Path, folder: Path, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What an engine of these arguments answers to generations, a score and a read."""
    from tests.engine.engine import tiny_engine
    from tests.engine.outputs import GENERATION_ONLY, OTHER, STRONG, reporting, tokens

    heads = {"layer": 3, "hook_kind": "attn.hook_z", "d_in": WIDTH_OF_HEADS, "seed": 2}
    saes = (
        {"layer": 0},
        {"layer": 3, "architecture": "standard", "seed": 1},
        {**heads, "threshold": 0.1},
        {**heads, "architecture": "topk", "layer": 2, "k": 8},
        {"seed": 4, "config": TRANSCODER, "metadata": PLACES},
    )
    engine = tiny_engine(model, folder, saes, **arguments)
    both: dict[str, Any] = {
        "interventions": [
            {"sae": "a", "feature": 3, "op": "clamp", "value": 6},
            {"sae": "b", "feature": 5, "op": "add", "value": 4},
        ],
        "report": True,
        "read": {"sae": "b", "top_k": 2},
    }
    steered: tuple[dict[str, Any], ...] = (STRONG, OTHER, GENERATION_ONLY)
    named = [
        {**field, "interventions": [{**field["interventions"][0], "sae": "a"}]} for field in steered
    ]
    of_heads: dict[str, Any] = {
        "interventions": [
            {"sae": "c", "feature": 3, "op": "clamp", "value": 6},
            {"sae": "d", "feature": 9, "op": "scale", "value": 4},
            {"sae": "c", "feature": 7, "op": "add", "value": 3,
             "when": {"sae": "d", "feature": 2, "below": 0.0}},
        ],
        "max_share": 2.0,
        "report": True,
        "read": {"sae": "c", "top_k": 2},
    }  # fmt: skip
    reconstructed = {
        "interventions": of_heads["interventions"][:2],
        "error_term": False,
        "report": True,
    }
    elsewhere: dict[str, Any] = {
        "interventions": [
            {"sae": "e", "feature": 3, "op": "clamp", "value": 6},
            {"sae": "e", "feature": 7, "op": "add", "value": 3,
             "when": {"sae": "e", "feature": 2, "below": 0.0}},
        ],
        "max_share": 2.0,
        "report": True,
        "read": {"sae": "e", "top_k": 2},
    }  # fmt: skip
    decoded = {"interventions": elsewhere["interventions"][:1], "error_term": False, "report": True}
    fields = [None, both, *map(reporting, named), of_heads, reconstructed, elsewhere, decoded]
    made = engine.generate([tokens(700 + i, 12 + 9 * i) for i in range(len(fields))], fields)
    result: list[dict[str, Any]] = [
        {
            "tokens": m.tokens,
            "logprobs": m.logprobs,
            "steering": None
            if m.steering is None
            else {"report": m.steering[0].interventions, "read": m.steering[0].read},
        }
        for m in made
    ]
    scored = scored_on(engine, tokens(700, 30), tokens(701, 20)[1:], both)
    result.append(
        {"tokens": scored.top_steered.tolist(), "logprobs": _columns(scored), "steering": None}
    )
    result.append(read_on(engine, tokens(702, 30), tokens(703, 20)[1:], both))
    engine.shut_down()
    return result


def scored_on(engine: Any, prompt: list[int], text: list[int], field: dict[str, Any]) -> Figures:
    """Figures of one steered text."""
    accepted = accept(
        {"interventions": field["interventions"]},
        catalog_for(engine.llm.llm_engine.vllm_config),
    )
    sides = [Side(tuple(prompt), tuple(text), one) for one in (None, accepted)]
    scorer = Scorer(OfflineReader(engine.llm))

    async def run() -> Figures:
        async with aclosing(scorer.compare(sides[0], [(sides[1], (5, 9))])) as found:
            return await anext(figures async for _, figures in found)

    return asyncio.run(run())


def read_on(
    engine: Any, prompt: list[int], text: list[int], field: dict[str, Any]
) -> dict[str, Any]:
    """What one steered text does to the features of SAEs at both ends of the model."""
    catalog = catalog_for(engine.llm.llm_engine.vllm_config)
    accepted = accept({"interventions": field["interventions"]}, catalog)
    reader, whole = OfflineReader(engine.llm), Text(tuple(prompt), tuple(text))
    side = Side(whole.prompt, whole.completion, accepted, ("a", "b"))

    async def run() -> tuple[tuple[Changes, ...], list[Pooled]]:
        unsteered = Side(whole.prompt, whole.completion)
        scorer = Scorer(reader, catalog)
        async with aclosing(scorer.compare(unsteered, [(side, ())])) as found:
            changed = await anext(figures.changes async for _, figures in found)
        pools = [Pool(sae, EVERY_TOKEN, "max") for sae in "ab"]
        return changed, [(await pooled(reader, catalog, [whole], pool))[0] for pool in pools]

    changed, read = asyncio.run(run())
    figures = [value for one in changed for value in (one.before, one.after)]
    figures += [one.dense(one.pooled) for one in read]
    return {
        "tokens": [*(one.tokens for one in changed), *(one.tokens for one in read)],
        "logprobs": [value for column in figures for value in column.tolist()],
        "steering": None,
    }


def _columns(scored: Figures) -> list[float]:
    columns = (scored.kl, scored.reverse_kl, scored.steered, scored.watched_steered.flatten())
    return [value for column in columns for value in column.tolist()]


if __name__ == "__main__":
    main()
