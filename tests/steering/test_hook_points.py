"""Where the op goes in a layer, and which layers are refused: no model is edited wrongly unseen."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae.card import HOOK_KINDS, READ_ONLY_KINDS, HookPoint
from steering.vllm import hook_points
from steering.vllm.decoder_layers import decoder_layers
from steering.vllm.unsupported import UnsupportedModelError
from steering.worker.ops import registered
from steering.worker.ops.buffers import InputNorm
from steering.worker.ops.layout import INPUT_LAYER, INPUT_RMS
from tests.steering import layers
from tests.steering.layers import WIDTH, Fused, Half, Model, NormAfter, Parallel, Plain

RESIDUAL_KINDS = ("hook_resid_pre", "hook_resid_post")


def install(model: nn.Module, point: str, tensor_parallel: int = 1, **kwargs: Any) -> None:
    stack = model.get_submodule("layers")
    assert isinstance(stack, nn.ModuleList)
    hook_points.install(model, HookPoint.parse(point), len(stack), tensor_parallel, **kwargs)


class Recorder:
    """Stands for the worker's state: keeps what the op sees, and adds to the stream if asked."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self.order: list[str] = []
        self.add: dict[str, float] = {}

    def apply_at(self, hook: str, hidden_states: Tensor, residual: Tensor | None) -> None:
        """As `SteeringState.apply_at`."""
        stream = hidden_states if residual is None else hidden_states + residual
        self.seen[hook] = stream.clone()
        self.order.append(hook)
        hidden_states += self.add.get(hook, 0.0)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    found = Recorder()
    registered.make_current(found)
    yield found
    registered._current.clear()


def norm(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def stream_before() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))


def places(kind: str, x: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
    """What each hook point of one layer reads, worked out from the layer's definition."""
    if kind == "parallel":
        attention = mlp = norm(x) * 0.5
        return {
            "hook_resid_pre": x,
            "hook_attn_out": attention,
            "attn.hook_out": attention,
            "mlp.hook_in": norm(x),
            "hook_mlp_out": mlp,
            "mlp.hook_out": mlp,
            "hook_resid_post": x + attention + mlp,
        }
    if kind == "after":
        own = x * 0.5
        middle = x + norm(own)
        own_mlp = middle * 0.5
        return {
            "hook_resid_pre": x,
            "attn.hook_out": own,
            "hook_attn_out": norm(own),
            "hook_resid_mid": middle,
            "mlp.hook_in": middle,
            "mlp.hook_out": own_mlp,
            "hook_mlp_out": norm(own_mlp),
            "hook_resid_post": middle + norm(own_mlp),
        }
    attention = norm(x) * 0.5
    middle = x + attention * factor
    mlp = norm(middle) * 0.5
    found = {
        "hook_resid_pre": x,
        "attn.hook_out": attention,
        "hook_resid_mid": middle,
        "ln2.hook_normalized": middle,  # what is hooked is the norm's input
        "mlp.hook_in": norm(middle),
        "mlp.hook_out": mlp,
        "hook_resid_post": middle + mlp * factor,
    }
    if factor == 1.0:
        found |= {"hook_attn_out": attention, "hook_mlp_out": mlp}
    return found


FORMS: dict[str, tuple[Callable[[], nn.Module], str, float]] = {
    "fused": (Fused, "plain", 1.0),
    "stale residual": (Parallel, "parallel", 1.0),
    "plain": (Plain, "plain", 1.0),
    "stale second value": (lambda: Plain(stale=True), "plain", 1.0),
    "factor": (lambda: Plain(0.25), "plain", 0.25),
    "norm after": (NormAfter, "after", 1.0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", HOOK_KINDS)
def test_each_place_reads_what_the_layers_definition_says_and_edits_reach_the_stream(
    form: str, kind: str, recorder: Recorder
) -> None:
    make, definition, factor = FORMS[form]
    x = stream_before()
    first = Model(make())
    second_input = first(x.clone())
    expected = places(definition, second_input, factor)
    model, hook = Model(make(), make()), f"blocks.1.{kind}"
    if kind not in expected:
        with pytest.raises(UnsupportedModelError, match=rf"^{hook}: "):
            install(model, hook)
        return
    install(model, hook)
    unedited = model(x.clone())
    assert recorder.order == [hook]
    torch.testing.assert_close(recorder.seen[hook], expected[kind])
    if kind in READ_ONLY_KINDS:
        return
    recorder.add[hook] = 1.0
    change = model(x.clone()) - unedited
    if kind in ("hook_resid_post", "hook_mlp_out"):
        torch.testing.assert_close(change, torch.ones_like(change))
    assert change.abs().max() > 0.01


def test_two_points_on_one_layer_and_the_next_ones_are_called_in_the_order_of_the_stream(
    recorder: Recorder,
) -> None:
    for make in (Fused, Plain, Parallel):
        model = Model(make(), make())
        hooks = [
            f"blocks.{layer}.{kind}"
            for layer, kind in itertools.product((0, 1), ("hook_resid_pre", "hook_resid_post"))
        ]
        for hook in (hooks[3], hooks[0], hooks[2], hooks[1]):
            install(model, hook)
        recorder.order.clear()
        model(stream_before())
        assert recorder.order == hooks
        torch.testing.assert_close(recorder.seen[hooks[1]], recorder.seen[hooks[2]])


def test_points_at_one_place_are_called_in_the_order_of_the_stream(recorder: Recorder) -> None:
    kinds = (
        *("hook_resid_pre", "attn.hook_out", "hook_attn_out", "hook_resid_mid"),
        *("ln2.hook_normalized", "mlp.hook_in", "mlp.hook_out", "hook_mlp_out", "hook_resid_post"),
    )
    hooks = [f"blocks.{layer}.{kind}" for layer in (0, 1) for kind in kinds]
    for make in (Fused, Plain):
        model = Model(make(), make())
        points = [HookPoint.parse(hook) for hook in random.Random(0).sample(hooks, len(hooks))]
        for point in hook_points.install_order(points):
            install(model, str(point))
        recorder.order.clear()
        model(stream_before())
        assert recorder.order == hooks


def test_the_heads_are_what_the_output_projection_is_given(recorder: Recorder) -> None:
    layer = Plain()
    layer.self_attn = layers.WithHeads()
    model, point = Model(layer), HookPoint.parse("blocks.0.attn.hook_z")
    x = stream_before()
    unedited = model(x.clone())
    assert hook_points.width_of_heads(model, point, 1, 1) == 6
    install(model, str(point))
    model(x.clone())
    torch.testing.assert_close(recorder.seen[str(point)], norm(x)[:, :6].square())
    recorder.add[str(point)] = 1.0
    assert (model(x.clone()) - unedited)[:, :6].abs().max() > 0.1


def test_heads_that_are_gated_or_of_another_width_are_refused() -> None:
    layer = Plain()
    layer.self_attn = layers.GatedHeads()
    with pytest.raises(UnsupportedModelError, match="something stands between the heads"):
        install(Model(layer), "blocks.0.attn.hook_z")
    layer.self_attn = layers.WithHeads()
    with pytest.raises(UnsupportedModelError, match="has 12 elements in its heads"):
        install(Model(layer), "blocks.0.attn.hook_z", tensor_parallel=2)


class RMSNorm(layers.PlainNorm):
    """A norm by a name that says what it does."""

    variance_epsilon = 1e-5


def test_what_stands_before_a_norms_gain_is_told_by_the_norm() -> None:
    point = HookPoint.parse("blocks.0.ln2.hook_normalized")
    layer = Plain()
    with pytest.raises(UnsupportedModelError, match="PlainNorm is not a known norm"):
        hook_points.input_norm(Model(layer), point, 1)
    layer.post_attention_layernorm = RMSNorm()
    assert hook_points.input_norm(Model(layer), point, 1) == InputNorm(INPUT_RMS, 1e-5)
    layer.post_attention_layernorm = nn.LayerNorm(WIDTH, eps=1e-3)
    assert hook_points.input_norm(Model(layer), point, 1) == InputNorm(INPUT_LAYER, 1e-3)
    plain = HookPoint.parse("blocks.0.mlp.hook_in")
    assert hook_points.input_norm(Model(layer), plain, 1) == InputNorm()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "one way or the other": (
        layers.Mixed,
        "hook_resid_post",
        "sometimes as one tensor and sometimes as the sum",
    ),
    "more than a tensor": (layers.Deferred, "hook_resid_post", "may be more than the first"),
    "another method": (layers.Bypassing, "hook_mlp_out", "mlp is not called by its forward"),
    "another method, own": (layers.Bypassing, "mlp.hook_out", "mlp is not called by its forward"),
    "a list of branches": (layers.Twice, "hook_attn_out", "made of several calls"),
    "a factor": (lambda: Plain(0.5), "hook_mlp_out", "multiplied by a factor"),
    "no attention": (layers.Mixer, "hook_attn_out", "has no attention by the names"),
    "run several times": (layers.Looped, "hook_resid_post", "more than once in a pass"),
    "another name": (layers.Nameless, "hook_resid_post", "no list|expected one list"),
    "ready-made input": (layers.Deferring, "hook_resid_pre", "ready-made"),
    "parallel": (Parallel, "hook_resid_mid", "read the same stream"),
    "no norm": (NormAfter, "ln2.hook_normalized", "there is no norm before it"),
    "another method, in": (layers.Bypassing, "mlp.hook_in", "mlp is not called once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_before_a_pass(case: str) -> None:
    make, kind, words = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=words) as refusal:
        install(Model(make()), f"blocks.0.{kind}")
    assert "\n" not in str(refusal.value)


def test_a_stream_that_float16_scales_is_refused_in_float16_only() -> None:
    install(Model(layers.Scaling()), "blocks.0.hook_resid_post", dtype=torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="use bfloat16"):
        install(Model(layers.Scaling()), "blocks.0.hook_resid_post", dtype=torch.float16)


def test_layers_of_two_forms_in_one_model_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Fused carries the stream as the sum"):
        install(Model(Fused(), Plain()), "blocks.0.hook_resid_post")


def test_layers_without_attention_by_name_are_served(recorder: Recorder) -> None:
    model = Model(layers.Mixer(), Plain())
    install(model, "blocks.0.hook_resid_post")
    install(model, "blocks.0.hook_mlp_out")


class Tower(nn.Module):
    """An image encoder beside a language model."""

    def __init__(self, name: str, tower: nn.Module, text: nn.Module) -> None:
        super().__init__()
        setattr(self, name, tower)
        self.language_model = text


class Multimodal(Tower):
    """One that says which its language model is, as vLLM's do."""

    def get_language_model(self) -> nn.Module:
        """As vLLM's ``SupportsMultiModal``."""
        return self.language_model


def test_a_tower_of_equal_depth_is_not_taken_for_the_language_model() -> None:
    text = Model(Plain(), Plain())
    for model in (
        Multimodal("other", Model(Plain(), Plain()), text),
        Tower("vision_tower", Model(Plain(), Plain()), text),
        Tower("visual", Model(Plain(), Plain()), text),
    ):
        assert decoder_layers(model, 2) is text.layers


def test_two_lists_of_the_same_layers_are_one() -> None:
    model = Model(Plain(), Plain())
    model.decoder = nn.Module()
    model.decoder.layers = model.layers[:]
    assert decoder_layers(model, 2)[1] is model.layers[1]


def test_lists_within_layers_are_no_candidates() -> None:
    assert len(decoder_layers(Model(layers.Twice(), layers.Twice()), 2)) == 2


def test_two_lists_that_could_be_the_layers_are_refused() -> None:
    twice = nn.Module()
    twice.one, twice.other = Model(Plain()), Model(Plain())
    with pytest.raises(UnsupportedModelError, match=r"found one\.layers, other\.layers"):
        decoder_layers(twice, 1)
    with pytest.raises(UnsupportedModelError, match=r"expected one list of 3 .* found none"):
        decoder_layers(twice, 3)


def test_partial_sums_are_refused_under_tensor_parallelism_only() -> None:
    def model() -> Model:
        layer = Plain()
        layer.self_attn.o_proj = nn.Linear(2, 2)
        layer.self_attn.o_proj.reduce_results = False
        return Model(layer)

    for kind in ("hook_attn_out", "hook_resid_mid"):
        with pytest.raises(UnsupportedModelError, match="o_proj leaves partial sums"):
            install(model(), f"blocks.0.{kind}", tensor_parallel=2)
        install(model(), f"blocks.0.{kind}")
    install(model(), "blocks.0.hook_resid_post", tensor_parallel=2)


@pytest.mark.parametrize("kind", RESIDUAL_KINDS)
def test_sums_left_to_the_next_layer_are_refused_under_tensor_parallelism_only(kind: str) -> None:
    def model() -> Model:
        return Model(layers.Deferring(), layers.Deferring())

    with pytest.raises(UnsupportedModelError, match="leaves the sum over tensor-parallel ranks"):
        install(model(), f"blocks.1.{kind}", tensor_parallel=2)
    install(model(), f"blocks.1.{kind}")


def test_a_forward_that_somebody_else_has_put_in_front_is_refused() -> None:
    layer = Plain()
    layer.forward = lambda *args: args[1]  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="--offload-backend"):
        install(Model(layer), "blocks.0.hook_resid_post")


def test_a_rewritten_method_bound_to_the_module_is_wrapped_where_it_is(recorder: Recorder) -> None:
    layer = Plain()

    def rewritten(self: nn.Module, hidden_states: Tensor) -> Tensor:
        return hidden_states * 0.5

    layer.mlp.forward = rewritten.__get__(layer.mlp)
    install(Model(layer), "blocks.0.hook_mlp_out")
    x = stream_before()
    Model(layer)(x.clone())
    torch.testing.assert_close(
        recorder.seen["blocks.0.hook_mlp_out"], places("plain", x)["hook_mlp_out"]
    )


def test_a_module_that_returns_no_tensor_is_refused() -> None:
    class Text(Half):
        def forward(self, hidden_states: Tensor) -> Any:
            return "text"

    layer = Plain()
    layer.self_attn = Text()
    install(Model(layer), "blocks.0.attn.hook_out")
    with pytest.raises(UnsupportedModelError, match="the module returns str"):
        layer.self_attn(stream_before())
