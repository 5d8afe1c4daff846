"""Finds the output projection of attention, which is given the heads' outputs side by side."""

from __future__ import annotations

from typing import Any

from torch import nn

from steering.vllm.flows import Attribute, Call
from steering.vllm.forward_trace import NotUnderstood, Trace, traces
from steering.vllm.layer_source import LayerSource, original_class


def heads_projection(attention: nn.Module, dtype: Any, tensor_parallel: int) -> str:
    """The name of the module below ``attention`` that is given the heads' outputs and nothing else.

    Args:
        attention: the attention module of a decoder layer.
        dtype: torch dtype of the model.
        tensor_parallel: how many ranks a tensor-parallel group has.

    Raises:
        NotUnderstood: if something stands between the heads and the projection (a gate, a norm), or
            if the projection's input is not as wide as all heads together.
    """
    subject = LayerSource(attention)
    names = {_projection(subject, trace) for trace in traces(subject, dtype=dtype)}
    if len(names) != 1:
        raise NotUnderstood(
            "its attention's output projection is not the same under all conditions"
        )
    ((heads, projection),) = names
    _refuse_other_widths(attention, heads, projection, tensor_parallel)
    return projection


def _projection(subject: LayerSource, trace: Trace) -> tuple[str, str]:
    """Paths of the heads and of the only module that is given their output unchanged."""
    for heads in trace.calls:
        if not _has_heads(subject, heads.path):
            continue
        readers = [
            call
            for call in trace.calls
            if [parts for _, parts in call.inputs] == [{heads.part: ()}] and call.inputs[0][0] == 0
        ]
        if len(readers) == 1 and _is_plain(trace, readers[0]):
            return heads.path, readers[0].path
    raise NotUnderstood(
        "in its attention something stands between the heads and the output projection"
    )


def _is_plain(trace: Trace, call: Call) -> bool:
    return call.forward and not call.buffer and len(trace.called(call.path)) == 1


def _has_heads(subject: LayerSource, path: str) -> bool:
    found = subject.attribute(path)
    return isinstance(found, Attribute) and all(
        isinstance(getattr(found.module, name, None), int) for name in ("num_heads", "head_size")
    )


def _refuse_other_widths(
    attention: nn.Module, heads: str, projection: str, tensor_parallel: int
) -> None:
    """Check that what comes out of the heads is as wide as what the projection takes."""
    module: Any = attention.get_submodule(heads)
    taken = getattr(attention.get_submodule(projection), "input_size", None)
    given = module.num_heads * module.head_size * tensor_parallel
    if taken != given:
        raise NotUnderstood(
            f"its {original_class(module).__name__} has {given} elements in its heads, but its "
            f"output projection takes {taken}"
        )
