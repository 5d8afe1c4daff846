"""torch.compile: the op is in the graph, and a graph compiled without it is never reused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.engine import Engine
from tests.engine.test_traps import GENERATION_ONLY, OTHER, STRONG, same, tokens


@pytest.mark.slow
def test_a_graph_compiled_without_saes_is_not_reused_with_them(
    make_engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    prompts = [tokens(600 + i, 12 + 5 * i) for i in range(4)]
    fields = [None, STRONG, OTHER, GENERATION_ONLY]
    eager = make_engine().generate(prompts, fields)
    plain_engine = make_engine(saes=(), enforce_eager=False)
    plain = plain_engine.generate(prompts, [None] * 4)
    plain_engine.shut_down()
    assert any((tmp_path / "cache").rglob("*")), "nothing was cached, so nothing is tested"
    compiled_engine = make_engine(enforce_eager=False)
    compiled = compiled_engine.generate(prompts, fields)
    for left, right in zip(compiled, eager, strict=True):
        assert same(left, right)
    assert same(compiled[0], plain[0])
    for left, right in zip(compiled[1:], plain[1:], strict=True):
        assert left.logprobs != right.logprobs
    # And once more from the cache that the steered start has filled.
    again = make_engine(enforce_eager=False).generate(prompts, fields)
    for left, right in zip(again, compiled, strict=True):
        assert left.tokens == right.tokens
        assert left.logprobs == right.logprobs
