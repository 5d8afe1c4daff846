"""In which form a decoder layer carries the stream, and where its branches join it.

Both follow from what the layer's ``forward`` does with its inputs (`forward_trace`). There are two
forms:

* fused: the stream is ``hidden_states + residual``, on the way in and on the way out;
* whole: the stream is ``hidden_states``, and a ``residual`` is not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from sae.card import HEADS, HookPoint
from steering.vllm.flows import EDIT, HIDDEN, RESIDUAL, Attribute, Call, Factors, Flow, Known
from steering.vllm.forward_trace import (
    EditAt,
    NotUnderstood,
    Subject,
    Trace,
    parameters,
    summary,
    traces,
)
from steering.vllm.head_outputs import heads_projection
from steering.vllm.unsupported import UnsupportedModelError

ATTENTION_NAMES: Final = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
MLP_NAMES: Final = (
    *("mlp", "mlps", "block_sparse_moe", "feed_forward", "ffn", "moe", "shared_mlp"),
    *("share_expert", "experts", "meta_mlp"),
)
#: Parameters that tell a layer which of several runs in one pass this is.
_LOOPS: Final = ("loop_idx", "current_step")
_T = TypeVar("_T")
_FLOAT16: Final = re.compile(r"dtype == torch\.float16")


@dataclass(frozen=True)
class Place:
    """Where the op is put.

    Attributes:
        path: path of the module below the layer; empty for the layer itself.
        output: whether the op edits what the module returns, or else what it is given.
        stream: for an input, the position or name of the argument that is edited.
        other: for an input, the argument that is summed with it; for an output, not None if the
            second value that is returned is summed with the first. None if the stream is whole.
    """

    path: str
    output: bool
    stream: int | str = HIDDEN
    other: int | str | None = None


@dataclass(frozen=True)
class Layer:
    """A layer and what is known of its surroundings.

    Attributes:
        subject: the layer's code.
        name: name of the layer's class.
        dtype: torch dtype of the model.
        tensor_parallel: how many ranks a tensor-parallel group has.
        first: whether it is the model's first layer.
    """

    subject: Subject
    name: str
    dtype: Any = None
    tensor_parallel: int = 1
    first: bool = False

    def place(self, point: HookPoint) -> Place:
        """Where the op for ``point`` goes.

        Raises:
            UnsupportedModelError: if the layer's forward has no such place, or is not understood.
        """
        find = _FINDERS.get(point.kind)
        try:
            if find is None:
                raise NotUnderstood(f"{point.kind} is not a place in a decoder layer")
            return find(self)
        except NotUnderstood as error:
            raise UnsupportedModelError(f"{point}: {self.name}: {error}") from None

    def fused(self) -> bool:
        """Whether the stream is the sum of two tensors.

        Raises:
            NotUnderstood: if neither form fits.
        """
        found = self._traces()
        forms = {_form(trace) for trace in found}
        if self.first and forms == {True}:
            # The first layer is given no residual, but returns what all layers return.
            for trace in self._traces(first=True):
                _form(trace, fused=True)
        if len(forms) == 1:
            return forms.pop()
        conditions = sorted({key for trace in found for key in trace.decisions})
        raise NotUnderstood(
            "its forward returns the stream sometimes as one tensor and sometimes as the sum of "
            "two, depending on " + (", ".join(conditions) or "whether it is the first layer")
        )

    def _traces(self, *, first: bool = False, edit: EditAt | None = None) -> list[Trace]:
        return traces(
            self.subject,
            dtype=self.dtype,
            tensor_parallel=self.tensor_parallel,
            first=first,
            edit=edit,
        )

    def parameters(self) -> list[str]:
        """The names of its forward's parameters, without ``self``.

        Raises:
            NotUnderstood: if they are not those of a layer that runs once in a pass.
        """
        forward = self.subject.method("forward")
        if forward is None:
            raise NotUnderstood("its forward has no source")
        names = parameters(forward)
        if HIDDEN not in names:
            raise NotUnderstood("its forward has no parameter hidden_states")
        if not set(_LOOPS).isdisjoint(names):
            raise NotUnderstood("its model runs it more than once in a pass")
        return names


def _resid_post(layer: Layer) -> Place:
    layer.parameters()
    return Place("", output=True, other=RESIDUAL if layer.fused() else None)


def _resid_pre(layer: Layer) -> Place:
    names = layer.parameters()
    if layer.first and "attn_in" in names:
        raise NotUnderstood(
            "it may take its attention's input ready-made, which would not see the edit; use "
            "hook_resid_post"
        )
    return Place("", output=False, other=RESIDUAL if layer.fused() else None)


def _resid_mid(layer: Layer) -> Place:
    layer.parameters()
    layer.fused()
    places = {_before_mlp(trace) for trace in layer._traces()}
    place = _only(places, "what its MLP reads is not the same")
    _check_edit(layer, EditAt(place.path, output=False))
    return place


def _normalized(layer: Layer) -> Place:
    place = _resid_mid(layer)
    if any(call.norm is None for trace in layer._traces() for call in trace.called(place.path)):
        raise NotUnderstood("its MLP reads the stream as it is; there is no norm before it")
    return place


def _mlp_in(layer: Layer) -> Place:
    layer.parameters()
    layer.fused()
    places = set()
    for trace in layer._traces():
        call = _one_call(trace, MLP_NAMES, "MLP")
        if len(trace.called(call.path)) > 1 or not call.forward or not call.inputs:
            raise NotUnderstood(f"{call.path} is not called once, by its forward, with a tensor")
        places.add(Place(call.path, False, call.inputs[0][0]))
    return _only(places, "what its MLP is given is not the same")


def _heads(layer: Layer) -> Place:
    layer.parameters()
    layer.fused()
    paths = {_one_call(trace, ATTENTION_NAMES, "attention").path for trace in layer._traces()}
    path = _only(paths, "its attention is not the same module")
    attention = layer.subject.attribute(path)
    if not isinstance(attention, Attribute) or attention.module is None:
        raise NotUnderstood("its attention is known only if the model is loaded")
    projection = heads_projection(attention.module, layer.dtype, layer.tensor_parallel)
    return Place(f"{path}.{projection}", False, 0)


def _branch(names: tuple[str, ...], what: str) -> Callable[[Layer], Place]:
    def find(layer: Layer) -> Place:
        layer.parameters()
        layer.fused()
        places = {_added(trace, names, what) for trace in layer._traces()}
        place = _only(places, f"what its {what} adds is not the same")
        _check_edit(layer, EditAt(place.path, output=True))
        return place

    return find


def _own_output(names: tuple[str, ...], what: str) -> Callable[[Layer], Place]:
    def find(layer: Layer) -> Place:
        layer.parameters()
        layer.fused()
        paths = set()
        for trace in layer._traces():
            call = _projected(trace, _one_call(trace, names, what))
            _refuse_unhookable(trace, call)
            paths.add(call.path)
        path = _only(paths, f"its {what} is not the same module")
        return Place(path, output=True)

    return find


_FINDERS: Final[Mapping[str, Callable[[Layer], Place]]] = {
    "hook_resid_pre": _resid_pre,
    "hook_resid_mid": _resid_mid,
    "ln2.hook_normalized": _normalized,
    "mlp.hook_in": _mlp_in,
    HEADS: _heads,
    "hook_resid_post": _resid_post,
    "hook_attn_out": _branch(ATTENTION_NAMES, "attention"),
    "hook_mlp_out": _branch(MLP_NAMES, "MLP"),
    "attn.hook_out": _own_output(ATTENTION_NAMES, "attention"),
    "mlp.hook_out": _own_output(MLP_NAMES, "MLP"),
}


def _form(trace: Trace, fused: bool | None = None) -> bool:
    """Whether one way through the forward carries the stream as a sum of two tensors."""
    for condition, taken in trace.decisions.items():
        if taken and _FLOAT16.search(condition):
            raise NotUnderstood("in float16 it scales the stream; use bfloat16")
    returned = trace.returned
    if fused is None:
        fused = trace.residual_used
    if fused:
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise NotUnderstood("it reads a residual, but does not return two tensors")
        total = _sum_of_pair(returned)
        expected = (HIDDEN,) if trace.residual_used is False else (HIDDEN, RESIDUAL)
        if any(total.get(part) != () for part in expected):
            raise NotUnderstood(
                f"the two tensors that it returns add up to {summary(total)}, not to the stream"
            )
        return True
    if isinstance(returned, Flow):
        _refuse_other_than_stream(trace, returned)
        return False
    if not (isinstance(returned, tuple) and returned and isinstance(returned[0], Flow)):
        raise NotUnderstood("it returns no tensor that could be the stream")
    whole, *rest = returned
    _refuse_other_than_stream(trace, whole)
    for other in rest:
        stale = isinstance(other, Flow) and _within(other, whole)
        if other != Known(None) and not stale:
            raise NotUnderstood(
                f"it returns {len(returned)} values, of which the stream may be more than the first"
            )
    return False


def _refuse_other_than_stream(trace: Trace, returned: Flow) -> None:
    """Check that what is returned contains the stream, or is what one module made of it."""
    if HIDDEN in returned.parts:
        return
    for call in trace.calls:
        if returned.parts == {call.part: ()} and call.forward and HIDDEN in call.sum_of_inputs():
            return
    raise NotUnderstood(
        f"what it returns, {summary(returned.parts)}, is not known to be the stream"
    )


def _within(part: Flow, whole: Flow) -> bool:
    return bool(part.parts) and part.parts.keys() <= whole.parts.keys()


def _sum_of_pair(returned: tuple[Any, ...]) -> Mapping[str, Factors]:
    total = Flow()
    for value in returned:
        if not isinstance(value, Flow):
            raise NotUnderstood("it reads a residual, but does not return two tensors")
        total.add(value)
    return total.parts


def _stream(trace: Trace) -> Mapping[str, Factors]:
    """The parts of what a layer returns as the stream."""
    returned = trace.returned
    if isinstance(returned, Flow):
        return returned.parts
    assert isinstance(returned, tuple), returned
    if trace.residual_used:
        return _sum_of_pair(returned)
    assert isinstance(returned[0], Flow), returned
    return returned[0].parts


def _check_edit(layer: Layer, edit: EditAt) -> None:
    """Check that an edit at this place comes out in the stream once, as the stream itself does."""
    for trace in layer._traces(edit=edit):
        stream = _stream(trace)
        if EDIT not in stream or stream[EDIT] != stream.get(HIDDEN):
            raise NotUnderstood(
                f"an edit at {edit.path} would not arrive unchanged in the stream that it returns"
            )


def _one_call(trace: Trace, names: tuple[str, ...], what: str) -> Call:
    calls = [call for call in trace.calls if call.path.split(".")[0] in names]
    if not calls:
        raise NotUnderstood(f"has no {what} by the names {', '.join(names)}")
    if len(calls) > 1:
        modules = ", ".join(dict.fromkeys(call.path for call in calls))
        raise NotUnderstood(f"its {what} is made of several calls ({modules})")
    return calls[0]


def _refuse_unhookable(trace: Trace, call: Call) -> None:
    if len(trace.called(call.path)) > 1:
        raise NotUnderstood(f"{call.path} is called more than once")
    if not call.forward:
        raise NotUnderstood(
            f"{call.path} is not called by its forward, so no edit can be put there"
        )
    if call.buffer:
        raise NotUnderstood(f"{call.path} writes its output into an argument")


def _followers(trace: Trace, call: Call) -> list[Call]:
    """The modules that are given this module's output and nothing else."""
    return [
        later for later in trace.calls if [parts for _, parts in later.inputs] == [{call.part: ()}]
    ]


def _projected(trace: Trace, call: Call) -> Call:
    """A branch's last module before its norm: the layer itself may project its heads' outputs."""
    while True:
        projections = [later for later in _followers(trace, call) if later.norm is None]
        if len(projections) != 1:
            return call
        call = projections[0]


def _added(trace: Trace, names: tuple[str, ...], what: str) -> Place:
    """The module whose output is the branch's and is added to the stream unchanged."""
    call = _one_call(trace, names, what)
    stream = _stream(trace)
    while call.part not in stream:
        followers = _followers(trace, call)
        if len(followers) != 1:
            raise NotUnderstood(
                f"what {call.path} returns is changed by something other than a module before it "
                "is added to the stream"
            )
        call = followers[0]
    if stream[call.part] != stream.get(HIDDEN):
        raise NotUnderstood(
            f"what {call.path} returns is multiplied by a factor before it is added to the stream"
        )
    _refuse_unhookable(trace, call)
    return Place(call.path, output=True)


def _before_mlp(trace: Trace) -> Place:
    """The module that is given the stream between attention and MLP: a norm or the MLP itself."""
    mlp = _one_call(trace, MLP_NAMES, "MLP")
    given = [parts for _, parts in mlp.inputs]
    readers = [call for call in trace.calls if call.norm is not None and {call.part: ()} in given]
    if not readers and given and HIDDEN in given[0]:
        readers = [mlp]
    if len(readers) != 1:
        raise NotUnderstood("its MLP is given neither a norm's output nor the stream")
    (reader,) = readers
    _refuse_unhookable(trace, reader)
    middle = reader.sum_of_inputs()
    if HIDDEN not in middle or not middle.keys() - {HIDDEN, RESIDUAL}:
        raise NotUnderstood("attention and MLP read the same stream; there is none between them")
    stream = _stream(trace)
    if not middle.keys() <= stream.keys():
        raise NotUnderstood(f"the stream before its MLP, {summary(middle)}, is not carried on")
    keys = [key for key, _ in reader.inputs]
    return Place(reader.path, False, keys[0], keys[1] if reader.norm == "adds" else None)


def _only(found: set[_T], otherwise: str) -> _T:
    if len(found) != 1:
        raise NotUnderstood(f"{otherwise} under all conditions")
    return found.pop()
