"""Names of hook points in three vocabularies, and what a refusal of one says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.card import HOOK_KINDS, HookPoint
from sae.errors import SAEError
from sae.hook_names import UnknownHookError, parse_hook


@pytest.mark.parametrize("kind", HOOK_KINDS)
@pytest.mark.parametrize("around", ["{}", " {} ", "{}.hook_sae_input"])
def test_field_s_own_names_are_what_they_are(kind: str, around: str) -> None:
    assert parse_hook(around.format(f"blocks.14.{kind}")) == HookPoint(14, kind)


@pytest.mark.parametrize(
    "prefix",
    [
        "layers", "model.layers", "model.language_model.layers", "language_model.model.layers",
        "model.text_model.layers", "backbone.layers", "transformer.h", "h", "gpt_neox.layers",
        "model.decoder.layers", "base_model.model.model.layers", "transformer.blocks",
        "_orig_mod.model.layers", "transformer.layers",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("", "hook_resid_post"),
        (".output", "hook_resid_post"),
        (".input", "hook_resid_pre"),
        (".mlp", "mlp.hook_out"),
        (".mlp.output", "mlp.hook_out"),
        (".self_attn", "attn.hook_out"),
        (".attn", "attn.hook_out"),
        (".attention", "attn.hook_out"),
        (".pre_feedforward_layernorm.input", "hook_resid_mid"),
        (".post_feedforward_layernorm", "hook_mlp_out"),
        (".mlp.input", "mlp.hook_in"),
        (".pre_feedforward_layernorm.output", "mlp.hook_in"),
        (".ln_2", "mlp.hook_in"),
        (".self_attn.o_proj.input", "attn.hook_z"),
        (".attn.c_proj.input", "attn.hook_z"),
    ],
)
def test_module_s_name_is_its_own_output(prefix: str, module: str, kind: str) -> None:
    assert parse_hook(f"{prefix}.12{module}") == HookPoint(12, kind)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("hook_z", "attn.hook_z"),
        ("ln2.hook_out", "mlp.hook_in"),
        # A copy of the stream, whatever SAELens calls Gemma Scope 2's transcoders' input.
        ("hook_mlp_in", "hook_resid_mid"),
    ],
)
def test_other_names_of_transformer_lens_are_read(name: str, kind: str) -> None:
    assert parse_hook(f"blocks.12.{name}") == HookPoint(12, kind)


@pytest.mark.parametrize(
    "name",
    [
        "", "blocks.14", "blocks.x.hook_resid_post", "blocks.-1.hook_resid_post",
        "model.layers.-1", "model.layers", "layer3", "Blocks.3.hook_resid_post",
        "blocks.3.HOOK_RESID_POST", "model.layers.3.input_layernorm",
        "model.layers.3.mlp.down_proj",
        # On Llama this is the norm before the MLP, on Gemma the one after attention.
        "model.layers.3.post_attention_layernorm",
        # Layers of other towers, and of a draft model.
        "vision_tower.encoder.layers.3", "model.visual.blocks.3", "audio_tower.layers.3",
        "encoder.layers.3", "mtp.layers.0", "hook_embed", "model.embed_tokens", "ln_final",
        "blocks.٣.hook_resid_post", "blocks.99999999999999999999.hook_resid_post",
    ],
)  # fmt: skip
def test_name_that_is_not_understood_is_refused_with_what_to_write(name: str) -> None:
    with pytest.raises(UnknownHookError, match="unknown hook point") as caught:
        parse_hook(name)
    for expected in ("blocks.LAYER.KIND", *HOOK_KINDS, "model.layers.LAYER"):
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("blocks.3.attn.hook_q", "attention's queries are not supported"),
        ("model.layers.3.self_attn.input", "the input of attention is not supported"),
        ("blocks.3.ln1.hook_normalized", "normalized input of attention is not supported"),
        ("blocks.3.mlp.hook_post", "neurons of the MLP are not supported"),
    ],
)
def test_place_at_which_nothing_is_served_is_refused_as_such(name: str, what: str) -> None:
    with pytest.raises(SAEError) as caught:
        parse_hook(name)
    assert what in str(caught.value)
    assert not isinstance(caught.value, UnknownHookError)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hook_embed", "blocks.0.hook_resid_pre if the model adds no position embedding"),
        ("model.embed_tokens", "blocks.0.hook_resid_pre if"),
        ("model.layers.-1", "first one, which is 0"),
    ],
)
def test_refusal_says_what_would_be_right(name: str, hint: str) -> None:
    with pytest.raises(UnknownHookError) as caught:
        parse_hook(name)
    assert hint in str(caught.value)


@given(st.text(max_size=40) | st.from_regex(r"[a-z_]+\.(layers|h|blocks)\.\d+(\.[a-z_.]+)?"))
def test_what_is_read_is_written_back_in_the_field_s_own_way(name: str) -> None:
    try:
        hook = parse_hook(name)
    except SAEError as error:
        assert "\n" not in str(error)
    else:
        assert HookPoint.parse(str(hook)) == hook == parse_hook(str(hook))
