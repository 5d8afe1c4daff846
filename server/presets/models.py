"""Presets among the models that vLLM serves: each is another name of the base model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from server.presets.preset import Preset
from server.presets.store import PresetStore

#: The name by which the request that is being served is answered, if it is a preset's.
_ANSWERED_AS: Final = ContextVar[str | None]("preset_answered_as", default=None)
#: Whether any preset's name stands for the base model in what is being served.
_MEANS_BASE: Final = ContextVar[bool]("preset_means_base", default=False)


@dataclass(frozen=True)
class Meant:
    """The preset that a request is steered by.

    Attributes:
        preset: the preset.
        by_default: whether the request names the base model instead, and so may opt out.
    """

    preset: Preset
    by_default: bool


class PresetModels:
    """vLLM's `OpenAIServingModels`, on which every preset stands beside the base model.

    The handlers of all routes share the object, so its methods are replaced on it: they tell vLLM
    whether a model exists and what a response calls it. A preset's name stands for the base model
    only on routes that steer, or that run nothing. On the others it stays unknown, since there it
    could only be ignored.
    """

    def __init__(self, models: Any, presets: PresetStore) -> None:
        self._models = models
        self._presets = presets
        self._is_base = models.is_base_model
        self._name = models.model_name
        self._list = models.show_available_models

    @property
    def base(self) -> str:
        """What the served model is called."""
        return str(self._models.base_model_paths[0].name)

    @property
    def steers_by_default(self) -> bool:
        """Whether requests to the base model are steered."""
        return self._presets.default is not None

    def install(self) -> None:
        """Let vLLM's routes ask here."""
        self._models.is_base_model = self.is_base_or_preset
        self._models.model_name = self.answered_as
        self._models.show_available_models = self.show

    async def meant(self, name: str | None) -> Meant | None:
        """How a request for the model `name` is steered; None if its own field alone decides."""
        if not self._presets.in_use:
            return None
        await self._presets.catch_up()
        if (preset := self._presets.known(name)) is not None:
            return Meant(preset, by_default=False)
        if self._presets.default is None or not self.is_base(name):
            return None
        preset = self._presets.known(self._presets.default)
        assert preset is not None, "the default preset is kept whatever becomes of its file"
        return Meant(preset, by_default=True)

    def is_base(self, name: str | None) -> bool:
        """Whether a request for `name` runs the base model as vLLM has it, without an adapter."""
        from vllm import envs

        if not name:
            return True
        if name in self._models.lora_requests:
            return False
        return bool(envs.VLLM_SKIP_MODEL_NAME_VALIDATION or self._is_base(name))

    def is_other(self, name: str) -> bool:
        """Whether `name` is that of an adapter or a preset."""
        return name in self._models.lora_requests or self._presets.known(name) is not None

    def is_base_or_preset(self, name: str) -> bool:
        """Replaces `is_base_model`."""
        if self._is_base(name) or name == _ANSWERED_AS.get():
            return True
        return _MEANS_BASE.get() and self._presets.known(name) is not None

    def answered_as(self, lora_request: Any = None) -> str:
        """Replaces `model_name`."""
        return _ANSWERED_AS.get() or str(self._name(lora_request))

    async def show(self) -> Any:
        """Replaces `show_available_models`: the presets stand right after the base model."""
        from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

        await self._presets.catch_up()
        shown = await self._list()
        cards = [
            ModelCard(
                id=preset.name,
                created=preset.created,
                owned_by="vllm-sae",
                root=self.base,
                parent=self.base,
                max_model_len=self._models.model_config.max_model_len,
                permission=[ModelPermission()],
            )
            for preset in self._presets.all()
        ]
        bases = len(self._models.base_model_paths)
        shown.data[bases:bases] = cards
        return shown


def taken_names(models: Any) -> set[str]:
    """The names of vLLM's served models and adapters."""
    return {path.name for path in models.base_model_paths}.union(models.lora_requests)


@contextmanager
def answering_as(meant: Meant | None) -> Iterator[None]:
    """Let the preset that a request names stand for the base model, and name the response's model.

    It holds within the context, and in tasks that are started within it.
    """
    token = _ANSWERED_AS.set(None if meant is None or meant.by_default else meant.preset.name)
    try:
        yield
    finally:
        _ANSWERED_AS.reset(token)


@contextmanager
def presets_mean_base() -> Iterator[None]:
    """Let every preset's name stand for the base model within the context."""
    token = _MEANS_BASE.set(True)
    try:
        yield
    finally:
        _MEANS_BASE.reset(token)
