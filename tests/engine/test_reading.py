"""What studies read of texts in vLLM is what hooks on transformers' model read."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from steering.request.accepted import Accepted, accept
from steering.request.probe import COMPLETION_TOKENS, EVERY_TOKEN, PROMPT_TOKENS, Pool, Tokens
from steering.studies.changes import Changes
from steering.studies.comparison import Comparison, Side
from steering.studies.reading import Pooled, pooled
from steering.studies.scoring import Scorer
from steering.vllm.door import catalog_for
from steering.vllm.reader import OfflineReader, Text
from tests.engine.engine import SPECIAL_TOKEN_IDS, Engine, tiny_engine
from tests.engine.outputs import tokens
from tests.engine.reference import ReferenceModel, ReferenceSAE
from tests.models import make_tiny_model

SAES: list[dict[str, Any]] = [
    {"layer": 1},
    {"layer": 2, "hook_kind": "hook_mlp_out", "seed": 1, "threshold": 0.02},
    {"layer": 3, "architecture": "topk", "seed": 2, "k": 12},
    {"layer": 3, "seed": 3, "d_sae": 96},
]
#: Passes of this many tokens: texts come in parts, and several share a pass.
PASS = 24
#: No activation of theirs is so near a jump that another rounding would decide it.
TEXTS = [
    Text(tuple(tokens(45, 20)), tuple(tokens(46, 13))),
    Text((0, *tokens(45, 6), 2, *tokens(46, 30)), (*tokens(47, 7), 3, *tokens(48, 22))),
    Text(tuple(tokens(45, 3)), tuple(tokens(46, 9))),
]
SPEC = {
    "interventions": [
        {"sae": "a", "feature": 3, "op": "clamp", "value": 4},
        {"sae": "a", "feature": 17, "op": "add", "value": -2, "positions": {"prompt": False}},
        {"sae": "c", "feature": 40, "op": "scale", "value": 3},
    ]
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("reading")
    model = make_tiny_model(folder / "llama", "llama")
    made = tiny_engine(model, folder, SAES, max_num_batched_tokens=PASS)
    yield made
    made.shut_down()


@pytest.fixture(scope="module")
def reference(engine: Engine) -> ReferenceModel:
    return ReferenceModel(engine.model, SPECIAL_TOKEN_IDS)


@pytest.fixture(scope="module")
def saes(engine: Engine) -> dict[str, ReferenceSAE]:
    return {name: ReferenceSAE(path) for name, path in engine.saes.items()}


def catalog(engine: Engine) -> Any:
    return catalog_for(engine.llm.llm_engine.vllm_config)


def taken(text: Text, over: Tokens, *, last_enters: bool) -> list[int]:
    """The positions that take part, worked out anew."""
    ids = [*text.prompt, *text.completion]
    phases = [(where.prompt, where.generation) for where in over]
    return [
        i
        for i, token in enumerate(ids if last_enters else ids[:-1])
        if i and token not in SPECIAL_TOKEN_IDS
        if any(p if i < len(text.prompt) else g for p, g in phases)
    ]


def streams(
    reference: ReferenceModel,
    saes: dict[str, ReferenceSAE],
    text: Text,
    field: dict[str, Any] | None = None,
    *,
    last_enters: bool = False,
) -> dict[str, Tensor]:
    """By SAE, the stream behind the edits."""
    ending = [*text.completion, 5] if last_enters else list(text.completion)
    _, made = reference.trace(text.prompt, ending, saes, field)
    return made.left


@pytest.mark.parametrize("sae", "abcd")
@pytest.mark.parametrize(
    ("over", "kind"),
    [(COMPLETION_TOKENS, "mean"), (PROMPT_TOKENS, "max"), (EVERY_TOKEN, "last")],
    ids=["completion", "prompt", "all"],
)
def test_texts_are_summed_up_as_hooks_on_transformers_read_them(
    engine: Engine,
    reference: ReferenceModel,
    saes: dict[str, ReferenceSAE],
    sae: str,
    over: Tokens,
    kind: Any,
) -> None:
    pool = Pool(sae, over, kind, peaks=True)
    found = asyncio.run(pooled(OfflineReader(engine.llm), catalog(engine), TEXTS, pool))
    for text, one in zip(TEXTS, found, strict=True):
        x = streams(reference, saes, text, last_enters=True)[sae]
        where = taken(text, over, last_enters=True)
        assert float(saes[sae].distance_to_jump(x[where], None).min()) > 2e-5
        _check(one, saes[sae].encode(x[where]), where, kind)
    assert len(engine.state.records) == 0


def _check(found: Pooled, f: Tensor, where: Sequence[int], kind: str) -> None:
    f64 = f.double().numpy()
    assert found.tokens == len(where)
    np.testing.assert_array_equal(found.dense(found.count), (f64 > 0).sum(axis=0))
    wanted = {"mean": f64.mean(axis=0), "max": f64.max(axis=0), "last": f64[-1]}[kind]
    np.testing.assert_allclose(found.dense(found.pooled), wanted, 1e-5, 1e-5)
    means = found.dense(found.total) / len(where)
    np.testing.assert_allclose(means, f64.mean(axis=0), 1e-5, 1e-5)
    assert found.peaks is not None
    assert found.peaks[0].tolist() == list(where)
    np.testing.assert_allclose(found.peaks[1], f64.max(axis=1), 1e-5, 1e-5)


def test_changes_are_those_that_hooks_on_transformers_see(
    engine: Engine, reference: ReferenceModel, saes: dict[str, ReferenceSAE]
) -> None:
    spec, control = _accepted(engine, SPEC), None
    texts = [
        (text, [_read(text, spec), _read(text, control), _read(_with_system(text), None)])
        for text in TEXTS
    ]
    found = _changes(engine, texts)
    fields: list[dict[str, Any] | None] = [SPEC, None, None]
    for place, (text, steered) in enumerate(texts):
        before = streams(reference, saes, text)
        for side, one in enumerate(steered):
            after = streams(reference, saes, Text(one.prompt, one.completion), fields[side])
            where = taken(text, one.covered, last_enters=False)
            longer = len(one.prompt) - len(text.prompt)
            shifted = [i + longer for i in where]
            for change in found[place, side]:
                name = change.sae
                _check_changes(
                    change, saes[name], before[name][where], after[name][shifted], control=side == 1
                )
        _check_asked(found[place, 0], before, reference, saes, text)
    _nothing_is_kept(engine)


def _read(text: Text, accepted: Accepted | None, saes: str = "abcd") -> Side:
    return Side(text.prompt, text.completion, accepted, tuple(saes))


def _with_system(text: Text) -> Text:
    return Text((*tokens(30, 9), *text.prompt), text.completion)


def _accepted(engine: Engine, field: dict[str, Any]) -> Accepted:
    return accept(field, catalog(engine))


def _comparisons(texts: Sequence[tuple[Text, Sequence[Side]]]) -> list[Comparison]:
    return [
        Comparison(Side(text.prompt, text.completion), [(side, ()) for side in steered])
        for text, steered in texts
    ]


def _changes(
    engine: Engine, texts: Sequence[tuple[Text, Sequence[Side]]]
) -> dict[tuple[int, int], tuple[Changes, ...]]:
    async def collect() -> dict[tuple[int, int], tuple[Changes, ...]]:
        scorer = Scorer(OfflineReader(engine.llm), catalog(engine))
        async with aclosing(scorer.compare_all(_comparisons(texts))) as found:
            return {(place, side): one.changes async for place, side, one in found}

    return asyncio.run(collect())


def _check_changes(
    found: Changes, sae: ReferenceSAE, before: Tensor, after: Tensor, *, control: bool
) -> None:
    n = len(before)
    assert found.tokens == n
    for x in (before, after):
        assert float(sae.distance_to_jump(x, None).min()) > 2e-5
    f, f_new = sae.encode(before).double(), sae.encode(after).double()
    np.testing.assert_allclose(found.before / n, f.mean(dim=0).numpy(), 1e-5, 1e-5)
    np.testing.assert_allclose(found.after / n, f_new.mean(dim=0).numpy(), 1e-5, 1e-5)
    others = [i for i in range(f.shape[1]) if i not in found.edited]
    fires, fires_new = f[:, others] > 0, f_new[:, others] > 0
    assert found.newly_active == int((fires_new & ~fires).sum())
    assert found.silenced == int((fires & ~fires_new).sum())
    if control:
        # Nothing changes but roundings, whose norms say nothing.
        assert (found.edited, found.newly_active, found.silenced) == ((), 0, 0)
        assert found.others < 1e-8
        return
    change = (f_new - f)[:, others]
    assert found.others == pytest.approx(float(change.square().sum()), rel=1e-3, abs=1e-8)
    entry = found.to_json(4, lambda i: None)
    assert [one["feature"] for one in entry["edited"]] == list(found.edited)
    size = (f_new - f).mean(dim=0).abs()
    size[list(found.edited)] = 0
    best = size.sort(descending=True, stable=True)
    for one, expected in zip(entry["moved"], best.values.tolist(), strict=False):
        assert abs(one["after"] - one["before"]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    of_stream = (after - before).double()
    if float(of_stream.square().sum()) > 1e-6:
        decoded = sae.decode(f_new.float(), after) - sae.decode(f.float(), before)
        left = float((of_stream - decoded).square().sum() / of_stream.square().sum())
        assert entry["explained"] == pytest.approx(1 - left, rel=1e-3, abs=1e-3)


def _check_asked(
    found: Sequence[Changes],
    before: dict[str, Tensor],
    reference: ReferenceModel,
    saes: dict[str, ReferenceSAE],
    text: Text,
) -> None:
    """The change that edits ask for is of what they read, which earlier edits have moved."""
    seen: dict[str, Tensor] = {}
    reference.logprobs(text.prompt, text.completion, saes, SPEC, seen)
    everywhere = taken(text, EVERY_TOKEN, last_enters=False)
    completion = taken(text, COMPLETION_TOKENS, last_enters=False)
    f_a, f_c = saes["a"].encode(seen["a"]).double(), saes["c"].encode(seen["c"]).double()
    asked = {
        "a": float((4 - f_a[everywhere, 3]).square().sum()) + 4.0 * len(completion),
        "b": 0.0,
        "c": float((2 * f_c[everywhere, 40]).square().sum()),
        "d": 0.0,
    }
    for change in found:
        assert change.asked == pytest.approx(asked[change.sae], rel=1e-3, abs=1e-9)
        leak = change.to_json(1, lambda i: None)["leak"]
        if asked[change.sae] == 0:
            assert leak is None
        else:
            assert leak == pytest.approx(math.sqrt(change.others / change.asked))


def test_what_is_left_early_is_forgotten(engine: Engine) -> None:
    async def leave() -> None:
        reader = OfflineReader(engine.llm, in_flight=2)
        texts = [(text, [_read(text, None, "ad")] * 3) for text in TEXTS]
        scorer = Scorer(reader, catalog(engine))
        async with aclosing(scorer.compare_all(_comparisons(texts))) as found:
            async for _ in found:
                break
        deadline = time.monotonic() + 10
        while len(engine.state.probes.kept) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    asyncio.run(leave())
    _nothing_is_kept(engine)


def _nothing_is_kept(engine: Engine) -> None:
    assert len(engine.state.probes.kept) == 0
    assert len(engine.state.captures) == 0
    assert len(engine.state.records) == 0
