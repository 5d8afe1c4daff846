"""Hook points in a model of transformers: what passes there, and something else in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from sae.card import HookPoint
from sae.errors import SAEError


@dataclass(frozen=True)
class _Module:
    """A module of a decoder layer, and which side of it a hook point is.

    Attributes:
        paths: below the layer; the first that the layer has.
        at_input: the hook point is the module's first argument, not its output.
    """

    paths: tuple[str, ...]
    at_input: bool = False


_MODULES: Final = {
    "hook_resid_pre": _Module(("",), at_input=True),
    "hook_resid_post": _Module(("",)),
    # The norm behind the MLP, if there is one.
    "hook_mlp_out": _Module(("post_feedforward_layernorm", "mlp")),
    "mlp.hook_out": _Module(("mlp",)),
    "mlp.hook_in": _Module(("mlp",), at_input=True),
    "attn.hook_z": _Module(("self_attn.o_proj",), at_input=True),
}

#: Takes what passes a hook point, `[windows, length, d]`, and returns what goes on in its place.
Edit = Callable[[torch.Tensor], torch.Tensor]


def watch(layers: Any, point: HookPoint, edit: Edit) -> Any:
    """Let `edit` replace what passes a hook point in every pass.

    Args:
        layers: the model's decoder layers.
        point: the hook point, of a kind in `_MODULES`.
        edit: called once a pass.

    Returns:
        A handle of PyTorch's, whose `remove` ends it.

    Raises:
        SAEError: if the model has no such place.
    """
    if point.layer >= len(layers):
        raise SAEError(f"{point}: the model has layers 0 to {len(layers) - 1}")
    module, at_input = _found(layers[point.layer], point)

    def edit_input(_: object, arguments: Any) -> Any:
        return (edit(arguments[0]), *arguments[1:])

    def edit_output(_: object, __: object, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return edit(output)
        return (edit(output[0]), *output[1:])

    if at_input:
        return module.register_forward_pre_hook(edit_input)
    return module.register_forward_hook(edit_output)


def caught(layers: Any, points: Sequence[HookPoint], call: Any) -> list[torch.Tensor]:
    """What passes the hook points while `call` runs the model once: `[windows, length, d]` each."""
    found: dict[HookPoint, torch.Tensor] = {}

    def keep(point: HookPoint) -> Edit:
        def kept(x: torch.Tensor) -> torch.Tensor:
            found[point] = x
            return x

        return kept

    handles = [watch(layers, point, keep(point)) for point in points]
    try:
        with torch.inference_mode():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return [found[point] for point in points]


def _found(layer: Any, point: HookPoint) -> tuple[Any, bool]:
    known = _MODULES.get(point.kind)
    if known is None:
        raise SAEError(f"{point}: expected a hook point of kind {', '.join(_MODULES)}")
    for path in known.paths:
        try:
            return layer.get_submodule(path), known.at_input
        except AttributeError:
            continue
    raise SAEError(f"{point}: the model's layers have no {known.paths[-1]}")
