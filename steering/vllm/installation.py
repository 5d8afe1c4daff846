"""Puts the op into a loaded model: a module gets a forward of its own that calls it."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steering.vllm.layer_form import Place
from steering.vllm.layer_source import STEERED, original_class
from steering.vllm.unsupported import UnsupportedModelError
from steering.worker.ops import registered


def install(layer: nn.Module, place: Place, hook: str, parameters: list[str]) -> None:
    """Have the op called at ``place``.

    Args:
        layer: the decoder layer.
        place: where in it.
        hook: the hook point's name.
        parameters: of the layer's forward, ``self`` left out.
    """
    module = layer.get_submodule(place.path)
    if not place.output:
        _wrap_input(module, hook, place, parameters)
    else:
        _wrap_output(module, hook, fused=place.other is not None)


def _wrap_output(module: nn.Module, hook: str, fused: bool) -> None:
    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = inner(self, *args, **kwargs)
            if fused:
                hidden_states, residual = output
                registered.steer(hidden_states, residual, hook)
            else:
                registered.steer(_first_tensor(output, hook), None, hook)
            return output

        return forward

    _replace_forward(module, wrap)


def _wrap_input(module: nn.Module, hook: str, place: Place, parameters: list[str]) -> None:
    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            stream = _argument(place.stream, parameters, args, kwargs)
            other = (
                None if place.other is None else _argument(place.other, parameters, args, kwargs)
            )
            registered.steer(stream, other, hook)
            return inner(self, *args, **kwargs)

        return forward

    _replace_forward(module, wrap)


def _replace_forward(
    module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Give one instance a forward of its own by giving it a class of its own.

    Unlike an instance attribute or a forward hook this is an ordinary method to torch.compile, and
    unlike a wrapper module it leaves the names of parameters as checkpoints and LoRA know them.
    """
    own = vars(module).get("forward")
    if own is not None:
        # vLLM's backend for transformers binds rewritten methods; they are wrapped where they are.
        if not isinstance(own, types.MethodType) or own.__self__ is not module:
            raise UnsupportedModelError(
                f"{original_class(module).__name__}: something else has given this module a "
                "forward of its own (--offload-backend does, for one), behind which the edit "
                "would be lost"
            )
        module.forward = types.MethodType(wrap(own.__func__), module)
        return
    base = type(module)
    module.__class__ = type(base.__name__, (base,), {"forward": wrap(base.forward), STEERED: True})


def _argument(
    name: int | str, parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    if isinstance(name, int):
        found: Tensor | None = args[name]
    elif name in kwargs:
        found = kwargs[name]
    else:
        found = args[parameters.index(name)]
    return found


def _first_tensor(output: Any, hook: str) -> Tensor:
    """What a module returns, or the first of it where it returns weights or a cache beside."""
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, torch.Tensor):
        raise UnsupportedModelError(f"{hook}: the module returns {type(found).__name__}")
    return found
