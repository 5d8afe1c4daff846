"""From the name of a hook point to the op in a loaded model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from enum import Enum, auto
from typing import Any, Final

import torch
from torch import nn

from sae.card import HEADS, HookPoint
from sae.pass_order import place_in_pass
from steering.vllm import installation
from steering.vllm.decoder_layers import decoder_layers, is_placeholder
from steering.vllm.forward_trace import NotUnderstood
from steering.vllm.layer_form import Layer, Place
from steering.vllm.layer_source import LayerSource, original_class
from steering.vllm.unsupported import UnsupportedModelError
from steering.worker.ops.buffers import InputNorm
from steering.worker.ops.layout import INPUT_LAYER, INPUT_RMS


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


_LAYER_POINTS: Final = ("hook_resid_pre", "hook_resid_post")
#: Where the op stands before a module, not behind it.
_INPUTS: Final = (
    *("hook_resid_pre", HEADS, "hook_resid_mid", "ln2.hook_normalized", "mlp.hook_in"),
)
#: What a matrix product is given, which is stored in any case.
_PRODUCT_INPUTS: Final = (HEADS, "mlp.hook_in")
#: Of Gemma-2 and 3, and of GLM-4.
_NORMS_AFTER_BRANCHES: Final = ("post_feedforward_layernorm", "post_mlp_layernorm")


def owned_hook_points(
    model: nn.Module, points: Iterable[HookPoint], num_layers: int
) -> list[HookPoint]:
    """Those of ``points`` whose layer lives in this worker.

    Under pipeline parallelism a stage holds placeholders for the layers of the others.
    """
    layers = decoder_layers(model, num_layers)
    return [point for point in points if not is_placeholder(layers[point.layer])]


def install_order(points: Iterable[HookPoint]) -> list[HookPoint]:
    """Hook points in the order of their installation.

    Of two at one place, the one that the pass comes by first must be called first. What is put
    before a module is called before all that was put there earlier; what is put behind it, after.
    """
    ordered = sorted(points, key=lambda point: place_in_pass(str(point)))
    before = [point for point in ordered if point.kind in _INPUTS]
    return [*reversed(before), *(point for point in ordered if point.kind not in _INPUTS)]


def width_of_heads(
    model: nn.Module, point: HookPoint, num_layers: int, tensor_parallel: int
) -> int:
    """Heads times head size, of all tensor-parallel ranks, where the heads are hooked.

    Raises:
        UnsupportedModelError: where the structure is not understood.
    """
    module = decoder_layers(model, num_layers)[point.layer]
    place = _layer(module, point.layer, torch.float32, tensor_parallel).place(point)
    return int(module.get_submodule(place.path).input_size)  # type: ignore[arg-type]


def input_norm(model: nn.Module, point: HookPoint, num_layers: int) -> InputNorm:
    """What a hook point is behind, in float32, of the place at which it is hooked.

    Raises:
        UnsupportedModelError: where the norm is none that is known.
    """
    if point.kind != "ln2.hook_normalized":
        return InputNorm()
    module = decoder_layers(model, num_layers)[point.layer]
    place = _layer(module, point.layer, torch.float32, 1).place(point)
    norm = module.get_submodule(place.path)
    name = original_class(norm).__name__
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    kind = INPUT_RMS if name.endswith("RMSNorm") else INPUT_LAYER if name == "LayerNorm" else None
    partial = getattr(norm, "variance_size_override", None) is not None
    if kind is None or not isinstance(eps, float) or partial:
        raise UnsupportedModelError(
            f"{point}: {name} is no norm that is known; a dictionary that reads before its gain "
            "cannot be served"
        )
    return InputNorm(kind, eps)


def install(
    model: nn.Module,
    point: HookPoint,
    num_layers: int,
    tensor_parallel: int,
    dtype: torch.dtype = torch.float32,
) -> Store:
    """Make the model call the op at ``point``.

    Args:
        model: as vLLM loaded it.
        point: of a layer that this worker holds.
        num_layers: of the model.
        tensor_parallel: ranks of a tensor-parallel group.
        dtype: of the model.

    Returns:
        what the op adds to a compiled graph.

    Raises:
        UnsupportedModelError: where the structure is not understood.
    """
    layers = decoder_layers(model, num_layers)
    _refuse_mixed_forms(layers, dtype)
    module = layers[point.layer]
    layer = _layer(module, point.layer, dtype, tensor_parallel)
    if tensor_parallel > 1:
        _refuse_deferred_sums(module, str(point))
    place = layer.place(point)
    # Of heads each rank has its own, whole.
    if tensor_parallel > 1 and point.kind not in (*_LAYER_POINTS, HEADS):
        _refuse_partial_sums(module, place, str(point))
    store = Store.AS_PLAIN if point.kind in _PRODUCT_INPUTS else _store(module, place)
    wide = store is Store.WIDE
    installation.install(module, place, str(point), layer.parameters(), wide=wide)
    return store


def _store(layer: nn.Module, place: Place) -> Store:
    """What the op at this place adds, by what makes the tensor that it is given."""
    if place.other is None and not place.path:
        return Store.ROUNDED  # a whole stream, which an addition makes
    after_norm = any(hasattr(layer, name) for name in _NORMS_AFTER_BRANCHES)
    if after_norm and (place.other is not None or place.path.endswith("norm")):
        return Store.WIDE
    # Experts that are always chosen are added to those that are, in the compiler's registers. A
    # store in float32 does not keep every bit there.
    return Store.ROUNDED if _has_shared_experts(layer) else Store.AS_PLAIN


def _has_shared_experts(layer: nn.Module) -> bool:
    """Whether the MLP's output is a sum, of experts that are chosen and experts that are not."""
    return any(
        name.rsplit(".", 1)[-1] in ("shared_expert", "shared_experts")
        for name, _ in layer.named_modules()
    )


def _layer(module: nn.Module, index: int, dtype: Any, tensor_parallel: int) -> Layer:
    name = original_class(module).__name__
    return Layer(LayerSource(module), name, dtype, tensor_parallel, first=index == 0)


def _refuse_mixed_forms(layers: nn.ModuleList, dtype: torch.dtype) -> None:
    """What one layer returns is what the next one takes: all carry the stream in one form."""
    forms: dict[bool, str] = {}
    for index, module in enumerate(layers):
        if not is_placeholder(module):
            layer = _layer(module, index, dtype, 1)
            try:
                forms[layer.fused()] = layer.name
            except NotUnderstood as error:
                raise UnsupportedModelError(f"{layer.name}: {error}") from None
    if len(forms) > 1:
        raise UnsupportedModelError(
            f"{forms[True]} carries the stream as the sum of two tensors, {forms[False]} as one"
        )


def _refuse_partial_sums(layer: nn.Module, place: Place, hook: str) -> None:
    """Under tensor parallelism every rank must hold the whole output, not its share of the sum."""
    searched = layer.get_submodule(place.path) if place.output else layer
    for name, child in searched.named_modules():
        if getattr(child, "reduce_results", True) is False:
            raise UnsupportedModelError(
                f"{hook}: {name} leaves partial sums on each tensor-parallel rank; "
                "use a resid_pre or resid_post hook"
            )


def _refuse_deferred_sums(layer: nn.Module, hook: str) -> None:
    """Where the next layer's norm adds up the ranks' shares, none of them holds the stream."""
    cls = original_class(layer)
    forward = inspect.unwrap(cls.forward)
    names = {*forward.__code__.co_names, *forward.__code__.co_freevars}
    if hasattr(layer, "ffn_all_reduce_deferred") or any("fused_allreduce" in n for n in names):
        raise UnsupportedModelError(
            f"{hook}: {cls.__name__} leaves the sum over tensor-parallel ranks to the next "
            "layer's norm, so that no rank holds the stream"
        )


__all__ = [
    "Place",
    "Store",
    "UnsupportedModelError",
    "input_norm",
    "install",
    "install_order",
    "owned_hook_points",
    "width_of_heads",
]
