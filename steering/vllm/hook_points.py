"""Where in a vLLM model a hook point is, found by the model's structure.

vLLM's decoder layers come in two forms. Fused ones take and return ``(hidden_states, residual)``
and the stream is their sum; plain ones take and return the stream itself. Which one a layer is
shows in whether its ``forward`` has a parameter named ``residual``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Any, Final

import torch
from torch import Tensor, nn

from sae.card import HookPoint
from steering.ops import registered

_ATTENTION_NAMES: Final = ("self_attn", "attn", "attention", "self_attention")
_MLP_NAMES: Final = ("mlp", "block_sparse_moe", "feed_forward", "ffn")


class UnsupportedModelError(ValueError):
    """The model's structure is not one that this project knows how to hook."""


class Store(Enum):
    """What the op adds to a compiled graph of a 16-bit model, which rounds what it stores.

    Attributes:
        AS_PLAIN: nothing: what the op is given, a matrix product's output, is stored without it.
        WIDE: a store in float32 (`registered.steer_wide`), which rounds nothing.
        ROUNDED: a store that rounds where vLLM's own graph does not.
    """

    AS_PLAIN = auto()
    WIDE = auto()
    ROUNDED = auto()


def owned_hook_points(
    model: nn.Module, points: Iterable[HookPoint], num_layers: int
) -> list[HookPoint]:
    """Those of ``points`` whose layer lives in this worker.

    Under pipeline parallelism a stage holds placeholders for the layers of the others.
    """
    layers = decoder_layers(model, num_layers)
    return [point for point in points if not _is_placeholder(layers[point.layer])]


def install(model: nn.Module, point: HookPoint, num_layers: int, tensor_parallel: int) -> Store:
    """Make the model call the op at ``point``.

    Raises:
        UnsupportedModelError: where the structure is not understood.
    """
    layer = decoder_layers(model, num_layers)[point.layer]
    hook = str(point)
    if point.kind in ("hook_resid_pre", "hook_resid_post"):
        parameters = list(inspect.signature(type(layer).forward).parameters)[1:]
        if "hidden_states" not in parameters:
            raise UnsupportedModelError(
                f"{type(layer).__name__}.forward has no parameter hidden_states; "
                f"its stream cannot be found for {hook}"
            )
        if tensor_parallel > 1:
            _refuse_deferred_sums(layer, hook)
        if "attn_in" in parameters and point == HookPoint(0, "hook_resid_pre"):
            raise UnsupportedModelError(
                f"{hook}: {type(layer).__name__} may take its attention's input ready-made, which "
                "would not see the edit; use hook_resid_post"
            )
        fused = "residual" in parameters
        wide = fused and (_is_sandwich(layer) or _has_shared_experts(layer))
        if point.kind == "hook_resid_pre":
            _wrap_input(layer, hook, parameters, fused, wide)
        else:
            _wrap_output(layer, hook, fused, wide)
        return Store.WIDE if wide else Store.AS_PLAIN if fused else Store.ROUNDED
    submodule = _branch_output(layer, point)
    if tensor_parallel > 1:
        _refuse_partial_sums(submodule, hook)
    wide = _is_sandwich(layer)
    _wrap_output(submodule, hook, fused=False, wide=wide)
    if wide:
        return Store.WIDE
    return Store.ROUNDED if _has_shared_experts(layer) else Store.AS_PLAIN


def _is_sandwich(layer: nn.Module) -> bool:
    """Whether a norm follows each branch, so that it makes what the layer returns."""
    return hasattr(layer, "pre_feedforward_layernorm")


def _has_shared_experts(layer: nn.Module) -> bool:
    """Whether the MLP's output is a sum, of experts that are chosen and experts that are not."""
    return any(
        name.rsplit(".", 1)[-1] in ("shared_expert", "shared_experts")
        for name, _ in layer.named_modules()
    )


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of decoder layers, placeholders included.

    Raises:
        UnsupportedModelError: if there is not exactly one candidate.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and all(_is_placeholder(child) or _looks_like_a_layer(child) for child in module)
    ]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one list of {num_layers} decoder layers, "
            f"found {names}"
        )
    return found[0][1]


def _looks_like_a_layer(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in _ATTENTION_NAMES)


def _is_placeholder(module: nn.Module) -> bool:
    return type(module).__name__ == "PPMissingLayer"


def _branch_output(layer: nn.Module, point: HookPoint) -> nn.Module:
    """The module whose output the layer adds to its stream.

    Sandwich-norm layers (Gemma-2 and 3) normalise a branch's output before it is added; there the
    norm is the place, as in TransformerLens.
    """
    attention = point.kind == "hook_attn_out"
    if _is_sandwich(layer):
        name = "post_attention_layernorm" if attention else "post_feedforward_layernorm"
        return _child(layer, (name,), point)
    return _child(layer, _ATTENTION_NAMES if attention else _MLP_NAMES, point)


def _child(layer: nn.Module, names: tuple[str, ...], point: HookPoint) -> nn.Module:
    for name in names:
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    raise UnsupportedModelError(
        f"{type(layer).__name__} has none of {', '.join(names)}; {point} cannot be found"
    )


def _refuse_partial_sums(module: nn.Module, hook: str) -> None:
    """Under tensor parallelism every rank must hold the whole output, not its share of the sum."""
    for name, child in module.named_modules():
        if getattr(child, "reduce_results", True) is False:
            raise UnsupportedModelError(
                f"{hook}: {name} leaves partial sums on each tensor-parallel rank; "
                "use a resid_pre or resid_post hook"
            )


def _refuse_deferred_sums(layer: nn.Module, hook: str) -> None:
    """Where the next layer's norm adds up the ranks' shares, none of them holds the stream."""
    forward = inspect.unwrap(type(layer).forward)
    names = {*forward.__code__.co_names, *forward.__code__.co_freevars}
    if hasattr(layer, "ffn_all_reduce_deferred") or any("fused_allreduce" in n for n in names):
        raise UnsupportedModelError(
            f"{hook}: {type(layer).__name__} leaves the sum over tensor-parallel ranks to the next "
            "layer's norm, so that no rank holds the stream"
        )


def _wrap_output(module: nn.Module, hook: str, fused: bool, wide: bool) -> None:
    base = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = base.forward(self, *args, **kwargs)
        if wide and fused:
            hidden_states, residual = output
            return registered.steer_wide(hidden_states, residual, hook), residual
        if wide:
            return registered.steer_wide(_only_tensor(output, hook), None, hook)
        if fused:
            hidden_states, residual = output
            registered.steer(hidden_states, residual, hook)
        else:
            registered.steer(_only_tensor(output, hook), None, hook)
        return output

    _replace_forward(module, forward)


def _wrap_input(
    module: nn.Module, hook: str, parameters: list[str], fused: bool, wide: bool
) -> None:
    base = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden_states = _argument("hidden_states", parameters, args, kwargs)
        residual = _argument("residual", parameters, args, kwargs) if fused else None
        if wide:
            hidden_states = registered.steer_wide(hidden_states, residual, hook)
            if "hidden_states" in kwargs:
                return base.forward(self, *args, **{**kwargs, "hidden_states": hidden_states})
            index = parameters.index("hidden_states")
            return base.forward(self, *args[:index], hidden_states, *args[index + 1 :], **kwargs)
        registered.steer(hidden_states, residual, hook)
        return base.forward(self, *args, **kwargs)

    _replace_forward(module, forward)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give one instance a forward of its own by giving it a class of its own.

    Unlike an instance attribute or a forward hook this is an ordinary method to torch.compile, and
    unlike a wrapper module it leaves the names of parameters as checkpoints and LoRA know them.
    """
    base = type(module)
    if "forward" in vars(module):
        raise UnsupportedModelError(
            f"{base.__name__}: something else has given this module a forward of its own "
            "(--offload-backend does, for one), behind which the edit would be lost"
        )
    module.__class__ = type(base.__name__, (base,), {"forward": forward})


def _argument(
    name: str, parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    if name in kwargs:
        found: Tensor = kwargs[name]
        return found
    return args[parameters.index(name)]  # type: ignore[no-any-return]


def _only_tensor(output: Any, hook: str) -> Tensor:
    if isinstance(output, torch.Tensor):
        return output
    if (
        isinstance(output, tuple)
        and isinstance(output[0], torch.Tensor)
        and not any(
            isinstance(other, torch.Tensor) and other.shape == output[0].shape
            for other in output[1:]
        )
    ):
        return output[0]
    raise UnsupportedModelError(f"{hook}: the module returns {type(output).__name__}, not a tensor")
