"""Puts the op into a loaded model: one module gets a forward of its own, which calls the op."""

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


def install(
    layer: nn.Module, place: Place, hook: str, parameters: list[str], *, wide: bool
) -> None:
    """Have a layer call the op at ``place``.

    Args:
        layer: the decoder layer.
        place: where in the layer.
        hook: the hook point's name.
        parameters: names of the parameters of the layer's forward, without ``self``.
        wide: whether a norm makes the stream there (`registered.steer_wide`).

    Raises:
        UnsupportedModelError: if something else has replaced the module's forward.
    """
    module = layer.get_submodule(place.path)
    if not place.output:
        _wrap_input(module, hook, place, parameters, wide)
    else:
        _wrap_output(module, hook, place.other is not None, wide)


def _wrap_output(module: nn.Module, hook: str, fused: bool, wide: bool) -> None:
    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = inner(self, *args, **kwargs)
            if fused:
                stream, residual = output
            else:
                stream, residual = _first_tensor(output, hook), None
            if not wide:
                registered.steer(stream, residual, hook)
                return output
            stream = registered.steer_wide(stream, residual, hook)
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        return forward

    _replace_forward(module, wrap)


def _wrap_input(
    module: nn.Module, hook: str, place: Place, parameters: list[str], wide: bool
) -> None:
    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            stream = _argument(place.stream, parameters, args, kwargs)
            assert stream is not None, f"{hook}: no stream came in"
            other = (
                None if place.other is None else _argument(place.other, parameters, args, kwargs)
            )
            if not wide:
                registered.steer(stream, other, hook)
                return inner(self, *args, **kwargs)
            stream = registered.steer_wide(stream, other, hook)
            if place.stream in kwargs:
                return inner(self, *args, **{**kwargs, place.stream: stream})
            index = (
                place.stream if isinstance(place.stream, int) else parameters.index(place.stream)
            )
            return inner(self, *args[:index], stream, *args[index + 1 :], **kwargs)

        return forward

    _replace_forward(module, wrap)


def _replace_forward(
    module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Give one instance a forward of its own by giving it a class of its own.

    To torch.compile this is an ordinary method, which an instance attribute or a forward hook is
    not. Unlike a wrapper module it leaves the names of parameters as checkpoints and LoRA know
    them.
    """
    own = vars(module).get("forward")
    if own is not None:
        # vLLM's backend for transformers binds rewritten methods to instances; they are wrapped
        # there.
        if not isinstance(own, types.MethodType) or own.__self__ is not module:
            raise UnsupportedModelError(
                f"{original_class(module).__name__}: something else has replaced this module's "
                "forward (--offload-backend does, for example), and edits would be lost"
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
    """What a module returns, or its first item if it returns weights or a cache as well."""
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, torch.Tensor):
        raise UnsupportedModelError(
            f"{hook}: the module returns {type(found).__name__}, not a tensor"
        )
    return found
