"""A vLLM engine under test, with what tests ask of it again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.source import ResolvedSAE
from steering.config import SteeringConfig
from steering.vllm.engine_arguments import engine_arguments
from tests.models import D_MODEL, NUM_LAYERS, make_tiny_sae

SPECIAL_TOKEN_IDS = (0, 1, 2, 3)


@dataclass
class Generated:
    """One choice: its tokens, and the log-probability of each."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    cached: int
    steering: Any = None


@dataclass
class Engine:
    """A running ``vllm.LLM`` and the SAEs it serves."""

    llm: Any
    model: Path
    saes: dict[str, Path] = field(default_factory=dict)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        fields: Sequence[Mapping[str, Any] | None],
        max_tokens: int = 8,
        salts: Sequence[str | None] | None = None,
        lora: Sequence[Any] | None = None,
        **sampling: Any,
    ) -> list[Generated]:
        """Greedy generations of one batch, each with its own ``steering`` field."""
        from vllm import SamplingParams

        from steering.vllm.results import results_of

        params = [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=0.0,
                logprobs=1,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if steering is None else {"steering": dict(steering)},
                **sampling,
            )
            for steering in fields
        ]
        requests: list[Any] = [{"prompt_token_ids": list(p)} for p in prompts]
        for request, salt in zip(requests, salts or [None] * len(requests), strict=True):
            if salt is not None:
                request["cache_salt"] = salt
        outputs = self.llm.generate(requests, params, use_tqdm=False, lora_request=lora)
        made = []
        for prompt, steering, output, its_params in zip(
            prompts, fields, outputs, params, strict=True
        ):
            choice = output.outputs[0]
            wants = steering is not None and (steering.get("report") or steering.get("read"))
            made.append(
                Generated(
                    list(prompt),
                    list(choice.token_ids),
                    [
                        entry[t].logprob
                        for entry, t in zip(choice.logprobs, choice.token_ids, strict=True)
                    ],
                    output.num_cached_tokens or 0,
                    results_of(self.llm, output, its_params) if wants else None,
                )
            )
        return made

    @property
    def scheduler(self) -> Any:
        """The engine core's scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def worker(self) -> Any:
        """The only worker."""
        return self.llm.llm_engine.model_executor.driver_worker.worker

    @property
    def state(self) -> Any:
        """The worker's steering state."""
        return self.worker.steering

    def shut_down(self) -> None:
        """End the engine; once is enough."""
        end([self])


def end(engines: Iterable[Engine]) -> None:
    """End engines; once is enough."""
    for engine in engines:
        if engine.llm is not None:
            engine.llm.llm_engine.engine_core.shutdown()
            engine.llm = None
    settle()


def settle() -> None:
    """Collect garbage, and let later collections look at what is made from now on.

    vLLM collects everything some eight times while an engine starts and ends, and makes all that
    was left out of collections a part of them again when one ends. In a process that has imported
    as much as this one each takes a second.
    """
    gc.collect()
    gc.freeze()


def tiny_engine(
    model: Path,
    folder: Path,
    saes: Sequence[Mapping[str, Any]] = ({},),
    *,
    special_token_ids: Sequence[int] | None = SPECIAL_TOKEN_IDS,
    sink_norm: float | None = None,
    max_rows: int = 4096,
    **arguments: Any,
) -> Engine:
    """An engine on a tiny model with SAEs made by ``make_tiny_sae``, named a, b, c..."""
    paths = {
        name: make_tiny_sae(folder / f"sae_{name}", **kwargs)
        for name, kwargs in zip("abcdefgh", saes, strict=False)
    }
    return start(
        model,
        paths,
        d_model=D_MODEL,
        num_layers=NUM_LAYERS,
        special_token_ids=special_token_ids,
        sink_norm=sink_norm,
        max_rows=max_rows,
        **arguments,
    )


def start(
    model: Path,
    saes: Mapping[str, Path],
    *,
    d_model: int,
    num_layers: int,
    special_token_ids: Sequence[int] | None,
    sink_norm: float | None = None,
    max_rows: int = 4096,
    **arguments: Any,
) -> Engine:
    """Start vLLM on ``model``; without SAEs it is plain vLLM.

    ``special_token_ids`` None: the tokenizer's.
    """
    from vllm import LLM

    steering: dict[str, Any] = {}
    if saes:
        references = tuple(
            ResolvedSAE(name, str(path), path=str(path), sink_norm=sink_norm)
            for name, path in saes.items()
        )
        special = None if special_token_ids is None else tuple(special_token_ids)
        steering = engine_arguments(
            SteeringConfig(references, d_model, num_layers, special, max_rows)
        )
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "distributed_executor_backend": "uni",
        "kv_cache_memory_bytes": 64 * 2**20,
    }
    return Engine(LLM(str(model), **{**defaults, **steering, **arguments}), model, dict(saes))
