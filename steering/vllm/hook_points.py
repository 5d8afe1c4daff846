"""Puts the op at named hook points of a loaded model."""

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
    """The store that the op adds to the compiled graph of a 16-bit model.

    Such a graph rounds what it stores, and keeps everything else in float32.

    Attributes:
        AS_PLAIN: none: a matrix product makes what the op is given, and that is stored anyway.
        WIDE: a store in float32 (`registered.steer_wide`), which rounds nothing.
        ROUNDED: a store that rounds where vLLM's own graph does not.
    """

    AS_PLAIN = auto()
    WIDE = auto()
    ROUNDED = auto()


_LAYER_POINTS: Final = ("hook_resid_pre", "hook_resid_post")
#: The kinds at which the op stands before a module, not after it.
_INPUTS: Final = (
    *("hook_resid_pre", HEADS, "hook_resid_mid", "ln2.hook_normalized", "mlp.hook_in"),
)
#: The kinds at which the op is given a matrix product's input, which is stored in any case.
_PRODUCT_INPUTS: Final = (HEADS, "mlp.hook_in")
#: Names of the norms after a branch in Gemma-2 and 3, and in GLM-4.
_NORMS_AFTER_BRANCHES: Final = ("post_feedforward_layernorm", "post_mlp_layernorm")


def owned_hook_points(
    model: nn.Module, points: Iterable[HookPoint], num_layers: int
) -> list[HookPoint]:
    """Those of ``points`` whose layer this worker holds.

    Under pipeline parallelism a stage has placeholders for the layers of the other stages.

    Raises:
        UnsupportedModelError: if the list of decoder layers is not found.
    """
    layers = decoder_layers(model, num_layers)
    return [point for point in points if not is_placeholder(layers[point.layer])]


def install_order(points: Iterable[HookPoint]) -> list[HookPoint]:
    """Hook points in the order in which they must be installed.

    If two are hooked at one module, the one that comes first in a pass must be called first. An op
    that is put before a module is called before those that were put there earlier; an op that is
    put after it is called after them.
    """
    ordered = sorted(points, key=lambda point: place_in_pass(str(point)))
    before = [point for point in ordered if point.kind in _INPUTS]
    return [*reversed(before), *(point for point in ordered if point.kind not in _INPUTS)]


def width_of_heads(
    model: nn.Module, point: HookPoint, num_layers: int, tensor_parallel: int
) -> int:
    """Number of heads times head size over all tensor-parallel ranks, at a hook point of heads.

    Args:
        model: as vLLM loaded it.
        point: an ``attn.hook_z``.
        num_layers: how many layers the model has.
        tensor_parallel: how many ranks a tensor-parallel group has.

    Raises:
        UnsupportedModelError: if the structure is not understood.
    """
    module = decoder_layers(model, num_layers)[point.layer]
    place = _layer(module, point.layer, torch.float32, tensor_parallel).place(point)
    return int(module.get_submodule(place.path).input_size)  # type: ignore[arg-type]


def input_norm(model: nn.Module, point: HookPoint, num_layers: int) -> InputNorm:
    """The norm that a hook point follows; the op itself stands before that norm.

    Args:
        model: as vLLM loaded it.
        point: the hook point.
        num_layers: how many layers the model has.

    Raises:
        UnsupportedModelError: if the norm is not known.
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
            f"{point}: {name} is not a known norm; a dictionary that reads before its gain cannot "
            "be served"
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
        point: a hook point whose layer this worker holds.
        num_layers: how many layers the model has.
        tensor_parallel: how many ranks a tensor-parallel group has.
        dtype: dtype of the model.

    Returns:
        What the op adds to a compiled graph.

    Raises:
        UnsupportedModelError: if the structure is not understood.
    """
    layers = decoder_layers(model, num_layers)
    _refuse_mixed_forms(layers, dtype)
    module = layers[point.layer]
    layer = _layer(module, point.layer, dtype, tensor_parallel)
    if tensor_parallel > 1:
        _refuse_deferred_sums(module, str(point))
    place = layer.place(point)
    # Each rank has some of the heads, and those whole.
    if tensor_parallel > 1 and point.kind not in (*_LAYER_POINTS, HEADS):
        _refuse_partial_sums(module, place, str(point))
    store = Store.AS_PLAIN if point.kind in _PRODUCT_INPUTS else _store(module, place)
    wide = store is Store.WIDE
    installation.install(module, place, str(point), layer.parameters(), wide=wide)
    return store


def _store(layer: nn.Module, place: Place) -> Store:
    """What the op adds at this place; that depends on what makes the tensor it is given."""
    if place.other is None and not place.path:
        return Store.ROUNDED  # a whole stream, which an addition makes
    after_norm = any(hasattr(layer, name) for name in _NORMS_AFTER_BRANCHES)
    if after_norm and (place.other is not None or place.path.endswith("norm")):
        return Store.WIDE
    # The compiler adds shared experts to the chosen ones in registers, where even a store in
    # float32 does not keep every bit.
    return Store.ROUNDED if _has_shared_experts(layer) else Store.AS_PLAIN


def _has_shared_experts(layer: nn.Module) -> bool:
    """Whether the MLP adds experts that every token uses to those that are chosen for it."""
    return any(
        name.rsplit(".", 1)[-1] in ("shared_expert", "shared_experts")
        for name, _ in layer.named_modules()
    )


def _layer(module: nn.Module, index: int, dtype: Any, tensor_parallel: int) -> Layer:
    name = original_class(module).__name__
    return Layer(LayerSource(module), name, dtype, tensor_parallel, first=index == 0)


def _refuse_mixed_forms(layers: nn.ModuleList, dtype: torch.dtype) -> None:
    """Check that all layers carry the stream in one form: each takes what the last one returns."""
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
    """Check that under tensor parallelism every rank holds the output, not its share of a sum."""
    searched = layer.get_submodule(place.path) if place.output else layer
    for name, child in searched.named_modules():
        if getattr(child, "reduce_results", True) is False:
            raise UnsupportedModelError(
                f"{hook}: {name} leaves partial sums on each tensor-parallel rank; "
                "use a resid_pre or resid_post hook"
            )


def _refuse_deferred_sums(layer: nn.Module, hook: str) -> None:
    """Refuse layers whose next norm adds up the ranks' shares: then no rank holds the stream."""
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
