"""Finds the list of decoder layers in a loaded model, whatever its modules are called."""

from __future__ import annotations

import re
from typing import Final

from torch import nn

from steering.vllm.flows import HIDDEN
from steering.vllm.forward_trace import parameters
from steering.vllm.layer_source import LayerSource
from steering.vllm.unsupported import UnsupportedModelError

#: Parts of a module's name that show that it is not the text model: it reads images or sound, or
#: drafts tokens.
_TOWER: Final = re.compile(
    r"(^|[._])(vision|visual|vit|image|img|video|audio|speech|sound|\w*tower|\w*encoder|qformer|"
    r"resampler|projector|draft\w*|mtp)([._]|$)"
)


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of decoder layers, including placeholders.

    It is searched below what vLLM calls the model's language model, if it names one.

    Args:
        model: as vLLM loaded it.
        num_layers: how many layers the list must have.

    Raises:
        UnsupportedModelError: if there is not exactly one candidate.
    """
    found: dict[tuple[int, ...], tuple[str, nn.ModuleList]] = {}
    outermost: list[str] = []
    for name, module in _language_model(model).named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == num_layers
            and not _TOWER.search(name)
            and not any(name.startswith(f"{outer}.") for outer in outermost)
            and all(is_placeholder(child) or _takes_a_stream(child) for child in module)
        ):
            outermost.append(name)
            # The same layers in a second list are still one model.
            found.setdefault(tuple(map(id, module)), (name, module))
    if len(found) != 1:
        names = ", ".join(name for name, _ in found.values()) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one list of {num_layers} decoder layers, "
            f"found {names}"
        )
    ((_, layers),) = found.values()
    return layers


def is_placeholder(module: nn.Module) -> bool:
    """Whether another pipeline stage holds this layer."""
    return type(module).__name__ == "PPMissingLayer"


def _language_model(model: nn.Module) -> nn.Module:
    get_language_model = getattr(model, "get_language_model", None)
    if get_language_model is None:
        return model
    try:
        # Every model that takes images has the method. It raises if vLLM cannot tell which module
        # is the language model, and then the whole model is searched.
        found = get_language_model()
    except (NotImplementedError, AttributeError):
        return model
    return found if isinstance(found, nn.Module) else model


def _takes_a_stream(module: nn.Module) -> bool:
    forward = LayerSource(module).method("forward")
    return forward is not None and HIDDEN in parameters(forward)
