"""torch.compile: the op is in the graph, and a graph compiled without it is never reused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from steering.vllm import worker
from tests.engine.engine import Engine, Generated
from tests.engine.outputs import GENERATION_ONLY, OTHER, STRONG, same, tokens


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_graph_compiled_without_saes_or_with_others_is_not_reused(
    make_engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU vLLM writes graphs to its cache and cannot load them ('function' object has no
    attribute 'finalize_loading'), so the folders in which it looks for them are compared too.
    """
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")  # the benchmarks' engines turn it off
    prompts = [tokens(600 + i, 12 + 5 * i) for i in range(4)]
    fields = [None, STRONG, OTHER, GENERATION_ONLY]
    eager = make_engine().generate(prompts, fields)
    plain_engine = make_engine(saes=(), enforce_eager=False)
    plain = plain_engine.generate(prompts, [None] * 4)
    folders = [cache_folder(plain_engine)]
    plain_engine.shut_down()
    compiled_engine = make_engine(enforce_eager=False)
    compiled = compiled_engine.generate(prompts, fields)
    for left, right in zip(compiled, eager, strict=True):
        assert same(left, right)
    assert same(compiled[0], plain[0])
    for left, right in zip(compiled[1:], plain[1:], strict=True):
        assert left.logprobs != right.logprobs
    folders.append(cache_folder(compiled_engine))
    compiled_engine.shut_down()
    elsewhere = ({"layer": 3},)
    expected = make_engine(saes=elsewhere).generate(prompts, fields)
    moved_engine = make_engine(saes=elsewhere, enforce_eager=False)
    moved = moved_engine.generate(prompts, fields)
    for left, right in zip(moved, expected, strict=True):
        assert same(left, right)
    folders.append(cache_folder(moved_engine))
    assert len(set(folders)) == len(folders)


def cache_folder(engine: Engine) -> str:
    """Where vLLM keeps the engine's compiled graph, and looks for it at the next start."""
    folder: str = engine.llm.llm_engine.vllm_config.compilation_config.local_cache_dir
    assert Path(folder, "rank_0_0", "model").is_file()
    return folder


def logprobs(made: list[Generated]) -> list[list[float]]:
    """Of each, the log-probabilities of its tokens."""
    return [each.logprobs for each in made]


# Gemma's layers end in a norm, which plain vLLM's graph does not round.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "hook_kind"),
    [
        ("llama", "hook_resid_post"),
        ("gemma2", "hook_mlp_out"),
        ("gemma3", "hook_resid_post"),
    ],
)
def test_unsteered_requests_of_a_compiled_bfloat16_model_keep_every_bit(
    make_engine: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    hook_kind: str,
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")  # the benchmarks' engines turn it off
    prompts = [tokens(700 + i, 12 + 5 * i) for i in range(4)]
    plain = make_engine(family, saes=(), enforce_eager=False, dtype="bfloat16")
    clean = logprobs(plain.generate(prompts, [None] * 4))
    plain.shut_down()
    saes = ({"hook_kind": hook_kind},)
    engine = make_engine(family, saes=saes, enforce_eager=False, dtype="bfloat16")
    assert logprobs(engine.generate(prompts, [None] * 4)) == clean
    beside = logprobs(engine.generate(prompts, [STRONG, None, None, None]))
    assert beside[0] != clean[0]
    assert beside[1:] == clean[1:]


@pytest.mark.slow
def test_a_stream_that_a_compiled_graph_rounds_is_named_at_start(
    make_engine: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    said: list[str] = []
    # Whether a logger's lines reach pytest depends on how vLLM has set up logging by then.
    monkeypatch.setattr(worker.logger, "warning", lambda text, *args: said.append(text % args))
    make_engine("gpt2", enforce_eager=False, dtype="bfloat16")
    (line,) = said
    assert "in bfloat16, the stream is rounded at blocks.1.hook_resid_post" in line
    make_engine("gpt2", dtype="bfloat16")
    assert said == [line]
