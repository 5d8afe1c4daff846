"""Studies on a `vllm.LLM`: the same functions as on a server, run to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from steering.errors import SteeringError
from steering.request.catalog import Catalog
from steering.studies.progress import Listener, Progress
from steering.studies.registry import STUDIES
from steering.studies.study import MAX_STUDY_TOKENS, Context
from steering.unembedding import Unembedding, open_unembedding
from steering.vllm.door import catalog_for
from steering.vllm.reader import OfflineReader
from steering.vllm.vocabulary import OfflineVocabulary

T = TypeVar("T")


class OfflineStudies:
    """Runs studies on an engine that steers.

    Args:
        llm: a `vllm.LLM` with SAEs.
        max_tokens: how many tokens one study may send through the model.
    """

    def __init__(self, llm: Any, max_tokens: int = MAX_STUDY_TOKENS) -> None:
        self._llm = llm
        self._max_tokens = max_tokens
        self._catalog: Catalog = catalog_for(llm.llm_engine.vllm_config)

    def run(
        self,
        name: str,
        body: Mapping[str, Any],
        sae: str | None = None,
        progress: Listener | None = None,
    ) -> dict[str, Any]:
        """Run one study.

        Args:
            name: name of the study.
            body: the body as the study's route takes it.
            sae: name of the SAE, for a study of one SAE.
            progress: called with the number of steps that are done, and of how many.

        Returns:
            What the study's route would answer.

        Raises:
            SteeringError: a ValueError, with the code and the path of what is wrong.
        """
        study = STUDIES[name]
        if study.of_sae:
            self._catalog.sae(str(sae))
        _refuse_other_model(body, self._llm)
        context = Context(
            self._catalog,
            OfflineReader(self._llm),
            OfflineVocabulary(self._llm),
            self._max_tokens,
            Progress(progress),
            unembedding=lambda: self._unembedding,
        )
        return _to_the_end(study.run(context, body, sae))

    @cached_property
    def _unembedding(self) -> Unembedding | None:
        return open_unembedding(self._llm.model_config, self._llm.get_tokenizer())


def _refuse_other_model(body: object, llm: Any) -> None:
    """Raise SteeringError if a body names another model than the engine's."""
    model = body.get("model") if isinstance(body, Mapping) else None
    served = llm.model_config.served_model_name
    known = {llm.model_config.model, *([served] if isinstance(served, str) else served or ())}
    if isinstance(model, str) and model not in known:
        raise SteeringError("invalid_value", f"this engine does not run {model[:80]!r}", "model")


def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine, and the tasks that it leaves behind, in an event loop of their own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_with_what_is_left(work))
    # In a notebook, a loop runs in this thread already.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, _with_what_is_left(work)).result()


async def _with_what_is_left(work: Coroutine[Any, Any, T]) -> T:
    try:
        return await work
    finally:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*left, return_exceptions=True)
