"""Dictionaries that read at one place and write at another, against formulas and libraries."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.errors import SAEError
from sae.layers import resolve_all
from sae.neighbours import nearest
from sae.sae import SAE, check_fits, open_sae
from sae.source import SAEReference
from tests.sae.oracles import assert_same_sae, oracle
from tests.sae.other_suites import (
    LAYERS,
    decoders,
    skip,
    write_attention_sae,
    write_circuit_tracer,
    write_circuit_tracer_clt,
    write_crosscoder,
    write_gemma_scope_2_clt,
    write_gemma_scope_2_transcoder,
    write_llama_scope_r1,
    write_llama_scope_transcoder,
    write_llamascopium,
    write_qresearch,
    write_sae_lens_transcoder,
    write_set_config,
)
from tests.sae.suites import D_IN, D_SAE, inputs, weights, write_gemma_scope, write_sparsify

Load = Callable[..., SAE]

READS, WRITES = "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The libraries warn, print and keep gradients."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        yield


def relu(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    return (x @ w["W_enc"].T + w["b_enc"]).relu()


def jumprelu(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    h = x @ w["W_enc"].T + w["b_enc"]
    return torch.where(h > w["threshold"], h.relu(), 0)


def assert_transcoder(
    sae: SAE,
    f_of: Callable[[Tensor, dict[str, Tensor]], Tensor],
    *,
    reads: str = READS,
    with_skip: bool = False,
    seed: int = 0,
) -> None:
    """Its places, its activations, its output, and the rows that an edit takes."""
    card = sae.card
    assert (card.kind, card.reads, card.writes) == ("transcoder", reads, (WRITES,))
    assert (card.hook, card.layer, card.d_in, card.d_out) == (WRITES, 3, D_IN, D_IN)
    assert card.error_term
    w, x = weights(seed), inputs()
    f = f_of(x, w)
    y = f @ w["W_dec"] + w["b_dec"] + (x @ skip().T if with_skip else 0)
    assert_same_sae(sae, lambda x: f_of(x, w), lambda f, x: (
        f @ w["W_dec"] + w["b_dec"] + (x @ skip().T if with_skip else 0)
    ))  # fmt: skip
    torch.testing.assert_close(sae.decode(f, x), y, atol=1e-4, rtol=1e-5)
    rows = sae.rows([7, 0])
    torch.testing.assert_close(rows.W_dec * rows.decoder_scale[:, None], w["W_dec"][[7, 0]])


# SAELens


@pytest.mark.parametrize(
    "architecture",
    ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"],
)
def test_sae_lens_transcoders_agree_with_their_library(
    tmp_path: Path, load: Load, architecture: str
) -> None:
    folder = write_sae_lens_transcoder(tmp_path / "t", architecture)
    theirs = oracle("sae_lens", "sae-lens").SAE.load_from_disk(folder)
    mine = load(folder)
    assert_transcoder(
        mine,
        jumprelu if "jumprelu" in architecture else relu,
        reads="blocks.3.ln2.hook_normalized",
        with_skip="skip" in architecture,
    )
    x = inputs()
    torch.testing.assert_close(mine.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.decode(mine.encode(x), x), theirs(x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("metadata", "reads"),
    [
        ({"hook_name": "blocks.3.hook_resid_mid"}, "blocks.3.hook_resid_mid"),
        ({"hook_name": "blocks.3.hook_mlp_in"}, "blocks.3.hook_resid_mid"),
        (
            {
                "hook_name": "blocks.3.hook_mlp_in",
                "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output",
                "hf_hook_name_out": "model.layers.3.post_feedforward_layernorm.output",
            },
            READS,
        ),
        # Of a LayerNorm that is not folded, that name stands for what is behind gain and bias.
        ({"model_name": "gpt2-small"}, READS),
        (
            {"model_name": "gpt2-small", "model_from_pretrained_kwargs": {"fold_ln": True}},
            "blocks.3.ln2.hook_normalized",
        ),
    ],
)
def test_sae_lens_names_where_a_transcoder_reads(
    tmp_path: Path, load: Load, metadata: dict[str, Any], reads: str
) -> None:
    card = load(write_sae_lens_transcoder(tmp_path / "t", "transcoder", metadata)).card
    assert (card.reads, card.writes) == (reads, (WRITES,))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"apply_b_dec_to_input": True}, "which SAELens has no transcoder for"),
        ({"normalize_activations": "layer_norm"}, "its output is not scaled back"),
        ({"d_out": None}, "d_out must be a positive integer"),
        ({"d_out": 13}, r"W_dec is \[40, 12\], expected \[40, 13\]"),
    ],
)
def test_sae_lens_transcoder_that_does_not_fit_is_refused(
    tmp_path: Path, load: Load, changes: dict[str, Any], what: str
) -> None:
    folder = write_sae_lens_transcoder(tmp_path / "t", "transcoder")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    with pytest.raises(SAEError, match=what):
        load(folder)


# Gemma Scope


def test_gemma_scope_transcoder_reads_before_the_gain(tmp_path: Path, load: Load) -> None:
    sae = load(write_gemma_scope(tmp_path, site="transcoders"))
    assert_transcoder(sae, jumprelu, reads="blocks.3.ln2.hook_normalized")


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("config", [False, True])
def test_gemma_scope_2_transcoder_reads_what_the_mlp_is_given(
    tmp_path: Path, load: Load, affine: bool, config: bool
) -> None:
    sae = load(write_gemma_scope_2_transcoder(tmp_path, affine=affine, config=config))
    assert sae.card.format == "gemma_scope_2"
    assert_transcoder(sae, jumprelu, with_skip=affine)


@pytest.mark.parametrize("site", ["attn_out", "attn_out_all"])
def test_gemma_scope_2_attention_is_read_at_the_heads(
    tmp_path: Path, load: Load, site: str
) -> None:
    folder = write_gemma_scope_2_transcoder(tmp_path, affine=False, config=False, site=site)
    card = load(folder).card
    assert (card.kind, card.hook, card.reads) == ("sae", *["blocks.3.attn.hook_z"] * 2)


@pytest.mark.parametrize("config", [False, True])
def test_gemma_scope_2_clt_writes_at_its_own_layer_and_every_later_one(
    tmp_path: Path, load: Load, config: bool
) -> None:
    folder = write_gemma_scope_2_clt(tmp_path, config=config)
    sae = load(folder, layer="4")
    card = sae.card
    assert (card.kind, card.reads, card.layer) == ("clt", "blocks.4.mlp.hook_in", 4)
    assert card.writes == ("blocks.4.hook_mlp_out", "blocks.5.hook_mlp_out")
    assert not card.error_term
    stored = decoders(LAYERS, seed=4)
    for place in (0, 1):
        torch.testing.assert_close(sae.rows([7, 2], place).W_dec, stored[[7, 2], 4 + place])
    torch.testing.assert_close(sae.decoder_rows(1, 3), stored[1:3, 4:].sum(dim=1))
    torch.testing.assert_close(sae.encode(inputs()), jumprelu(inputs(), weights()))


def test_crosscoder_s_slot_is_an_sae_of_its_layer(tmp_path: Path, load: Load) -> None:
    for config in (False, True):
        folder = write_crosscoder(tmp_path / str(config), config=config)
        sae = load(folder, layer="9")
        card = sae.card
        assert (card.kind, card.reads) == ("crosscoder", "blocks.9.hook_resid_post")
        assert card.writes == ("blocks.9.hook_resid_post",)
        assert not card.error_term
        stored = decoders(3, seed=1)
        torch.testing.assert_close(sae.rows([7]).W_dec[0], stored[7, 1])
        torch.testing.assert_close(sae.decoder_rows(0, D_SAE), stored[:, 1])
        with pytest.raises(SAEError, match=r"has no layer 1, but 5, 9, 12"):
            load(folder, layer="1")


def test_crosscoder_of_unknown_layers_is_refused(tmp_path: Path, load: Load) -> None:
    folder = write_crosscoder(tmp_path, config=False)
    plain = folder.rename(tmp_path / "crosscoder")
    with pytest.raises(SAEError, match="which layers this crosscoder is of is stated nowhere"):
        load(plain, layer="1")


# circuit-tracer


@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
def test_circuit_tracer_s_set_has_a_transcoder_a_layer(
    tmp_path: Path, load: Load, threshold: bool, with_skip: bool
) -> None:
    folder = write_circuit_tracer(
        tmp_path / "set", layers=4, threshold=threshold, with_skip=with_skip
    )
    f_of = jumprelu if threshold else relu
    for path, stated in ((folder, {"layer": "3"}), (folder / "layer_3.safetensors", {})):
        assert_transcoder(load(path, **stated), f_of, with_skip=with_skip, seed=3)
    with pytest.raises(SAEError, match=r"a set of 4 layers \(0, 1, 2, 3\); state which"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "reads"),
    [
        ({"feature_input_hook": "hook_resid_mid"}, "blocks.3.hook_resid_mid"),
        ({"feature_input_hook": "ln2.hook_normalized"}, "blocks.3.ln2.hook_normalized"),
    ],
)
def test_circuit_tracer_s_configuration_names_the_places(
    tmp_path: Path, load: Load, config: dict[str, str], reads: str
) -> None:
    folder = write_circuit_tracer(tmp_path / "set", layers=4, config=config)
    assert_transcoder(load(folder, layer="3"), relu, reads=reads, seed=3)


@pytest.mark.parametrize("stated_k", ["file", "config"])
def test_circuit_tracer_s_top_k_is_of_pre_activations(
    tmp_path: Path, load: Load, stated_k: str
) -> None:
    config = {"activation": "topk"} | ({"k": 3} if stated_k == "config" else {})
    folder = write_circuit_tracer(tmp_path / "set", layers=4, config=config)
    if stated_k == "file":
        path = folder / "layer_3.safetensors"
        save_file(load_file(path) | {"k": torch.tensor(3)}, path)
    w, x = weights(3), inputs()
    h = x @ w["W_enc"].T + w["b_enc"]
    values, indices = h.topk(3)
    assert (values > 0).all()
    sae = load(folder, layer="3")
    assert (sae.card.architecture, sae.card.k) == ("topk", 3)
    torch.testing.assert_close(sae.encode(x), torch.zeros_like(h).scatter_(1, indices, values))


def test_circuit_tracer_s_file_without_its_configuration_needs_its_places(
    tmp_path: Path, load: Load
) -> None:
    folder = write_circuit_tracer(tmp_path / "set", layers=4)
    (folder / "config.yaml").unlink()
    with pytest.raises(SAEError, match=r"stated nowhere; state it as .*,reads=.*,writes="):
        load(folder, layer="3")
    assert_transcoder(load(folder, layer="3", reads=READS, writes=WRITES), relu, seed=3)
    # Qwen3 14B's set has none; its kin read what the MLP is given.
    qwen = folder.rename(tmp_path / "qwen3-14b-transcoders")
    assert_transcoder(load(qwen, layer="3"), relu, seed=3)


def test_circuit_tracer_s_configuration_that_is_none_is_refused(tmp_path: Path, load: Load) -> None:
    folder = write_circuit_tracer(tmp_path / "set", layers=4)
    for text, what in (
        ("[1, 2]", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("a: &x [1]\nb: [*x, *x]\n", "with aliases"),
        ("feature_input_hook: mlp.hook_in\n", "feature_output_hook must be a string"),
    ):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(SAEError, match=what):
            load(folder, layer="3")
    write_set_config(folder, "transcoder_set", {"activation": "gelu"})
    with pytest.raises(SAEError, match="unknown activation 'gelu'"):
        load(folder, layer="3")


@pytest.mark.parametrize("threshold", [False, True])
def test_circuit_tracer_s_clt_reads_the_stream_and_writes_at_later_layers(
    tmp_path: Path, load: Load, threshold: bool
) -> None:
    folder = write_circuit_tracer_clt(tmp_path / "clt", threshold=threshold)
    f_of = jumprelu if threshold else relu
    for path, stated in ((folder, {"layer": "4"}), (folder / "W_enc_4.safetensors", {})):
        sae = load(path, **stated)
        card = sae.card
        assert (card.kind, card.reads, card.layer) == ("clt", "blocks.4.hook_resid_mid", 4)
        assert card.writes == ("blocks.4.hook_mlp_out", "blocks.5.hook_mlp_out")
        torch.testing.assert_close(sae.encode(inputs()), f_of(inputs(), weights(4)))
        for place in (0, 1):
            stored = decoders(2, seed=4)
            torch.testing.assert_close(sae.rows([7, 2], place).W_dec, stored[[7, 2], place])
    with pytest.raises(SAEError, match="is the decoder of a cross-layer transcoder"):
        load(folder / "W_dec_4.safetensors")
    before = load(folder, layer="4").sha256()
    decoder = load_file(folder / "W_dec_4.safetensors")
    decoder["W_dec_4"][3, 1, 2] = torch.inf
    save_file(decoder, folder / "W_dec_4.safetensors")
    changed = load(folder, layer="4")
    assert changed.sha256() != before
    with pytest.raises(SAEError, match="W_dec_4 of feature 3 has a value that is not finite"):
        changed.scan_nonfinite()
    (folder / "W_dec_4.safetensors").unlink()
    with pytest.raises(SAEError, match=r"no W_dec_4\.safetensors beside it"):
        load(folder, layer="4")


@pytest.mark.parametrize(
    ("write", "layers"),
    [
        (write_gemma_scope_2_clt, range(LAYERS)),
        (write_crosscoder, (5, 9, 12)),
        (lambda root: write_circuit_tracer(root, layers=3), range(3)),
        (lambda root: write_circuit_tracer_clt(root), range(LAYERS)),
    ],
)
def test_all_layers_of_a_set_are_a_dictionary_each(
    tmp_path: Path, write: Callable[[Path], Path], layers: Any
) -> None:
    found = resolve_all(SAEReference.parse(f"t={write(tmp_path / 'x')},layer=all"))
    assert [ref.name for ref in found] == [f"t.{layer}" for layer in layers]
    assert [open_sae(ref).card.layer for ref in found] == [*layers]


# Llama Scope


def test_llama_scope_transcoder_has_a_scale_on_each_side(tmp_path: Path, load: Load) -> None:
    sae = load(write_llama_scope_transcoder(tmp_path))
    w, x = weights(), inputs()
    s_in, s_out = D_IN**0.5 / 3.5, D_IN**0.5 / 0.6
    h = s_in * x @ w["W_enc"].T + w["b_enc"]
    f = torch.where(h * w["W_dec"].norm(dim=1) > 0.9 * s_in, h.relu(), 0)
    card = sae.card
    assert (card.kind, card.reads) == ("transcoder", "blocks.3.ln2.hook_normalized")
    torch.testing.assert_close(sae.encode(x), f, atol=1e-4, rtol=1e-4)
    y = (f @ w["W_dec"] + w["b_dec"]) / s_out
    torch.testing.assert_close(sae.decode(f, x), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by_norm", [True, False])
def test_llama_scope_r1_has_its_threshold_in_training_s_units(
    tmp_path: Path, load: Load, by_norm: bool
) -> None:
    folder = write_llama_scope_r1(
        tmp_path,
        sparsity_include_decoder_norm=by_norm,
        dataset_average_activation_norm={"in": 8.5},
    )
    sae = load(folder)
    assert (sae.card.format, sae.card.hook) == ("llamascopium", "blocks.3.hook_resid_post")
    w, x, s = weights(), inputs(), D_IN**0.5 / 8.5
    h = s * x @ w["W_enc"].T + w["b_enc"]
    norm = w["W_dec"].norm(dim=1) if by_norm else 1
    f = torch.where(h * norm > w["threshold"] + 0.1, h.relu(), 0)
    torch.testing.assert_close(sae.encode(x), f, atol=1e-4, rtol=1e-4)
    x_hat = (f @ w["W_dec"] + w["b_dec"]) / s
    torch.testing.assert_close(sae.decode(f, x), x_hat, atol=1e-3, rtol=1e-4)


def test_norm_of_a_dataset_that_is_stated_nowhere_is_refused(tmp_path: Path, load: Load) -> None:
    with pytest.raises(SAEError, match=r"average norm at blocks\.3\.hook_resid_post is"):
        load(write_llama_scope_r1(tmp_path))


def test_norm_of_a_copy_of_llama_scope_r1_is_the_registry_s(tmp_path: Path, load: Load) -> None:
    oracle("sae_lens", "sae-lens")
    folder = write_llama_scope_r1(tmp_path, repository="Llama-Scope-R1-Distill")
    s = 20.258785842
    torch.testing.assert_close(load(folder).rows([3]).W_enc[0], weights()["W_enc"][3] * s)


@pytest.mark.parametrize(("mode", "scaled"), [("dataset-wise", True), ("inference", False)])
def test_llamascopium_s_top_k_ranks_by_what_is_written(
    tmp_path: Path, load: Load, mode: str, scaled: bool
) -> None:
    sae = load(write_llamascopium(tmp_path / "t", norms=(3.5, 0.6), norm_activation=mode))
    card = sae.card
    assert (card.kind, card.architecture, card.k) == ("transcoder", "topk", 5)
    w, x = weights(), inputs()
    s_in, s_out = (D_IN**0.5 / 3.5, D_IN**0.5 / 0.6) if scaled else (1.0, 1.0)
    h = s_in * x @ w["W_enc"].T + w["b_enc"]
    ranked = h * w["W_dec"].norm(dim=1)
    kept = torch.zeros_like(h, dtype=torch.bool).scatter_(1, ranked.topk(5).indices, True)
    y = (torch.where(kept, h.relu(), 0) @ w["W_dec"] + w["b_dec"]) / s_out
    f = sae.encode(x)
    assert ((f > 0) == (kept & (h > 0))).all()
    torch.testing.assert_close(sae.decode(f, x), y, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sae_type": "lorsa"}, "unknown sae_type 'lorsa'"),
        ({"sae_type": "clt"}, "unknown sae_type 'clt'"),
        ({"act_fn": "gelu"}, "unknown act_fn 'gelu'"),
        ({"norm_activation": "token-wise"}, "unknown norm_activation"),
        ({"use_glu_encoder": True}, "use_glu_encoder is true"),
        ({"top_k": None}, "top_k must be a positive integer"),
    ],
)
def test_llamascopium_that_is_not_understood_is_refused(
    tmp_path: Path, load: Load, changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(SAEError, match=what):
        load(write_llamascopium(tmp_path / "t", norms=(3.5, 0.6), **changes))


# sparsify


@pytest.mark.parametrize("with_skip", [False, True])
def test_sparsify_transcoder_agrees_with_its_library(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, with_skip: bool
) -> None:
    folder = write_sparsify(
        tmp_path, module="layers.3.mlp", transcode=True, skip_connection=with_skip
    )
    if with_skip:
        path = folder / "sae.safetensors"
        save_file(load_file(path) | {"W_skip": skip()}, path)
    module = oracle("sparsify.sparse_coder", "eai-sparsify")
    monkeypatch.setattr(
        module, "decoder_impl", oracle("sparsify.utils", "eai-sparsify").eager_decode
    )
    theirs = module.SparseCoder.load_from_disk(folder)
    mine = load(folder)
    card = mine.card
    assert (card.kind, card.reads, card.writes) == (
        "transcoder", READS, ("blocks.3.mlp.hook_out",),
    )  # fmt: skip
    x = inputs()
    top = theirs.encode(x)
    f = torch.zeros(len(x), D_SAE).scatter_(1, top.top_indices, top.top_acts)
    torch.testing.assert_close(mine.encode(x), f, atol=1e-5, rtol=1e-5)
    y = theirs.decode(top.top_acts, top.top_indices)
    y = y + x @ skip().mT if with_skip else y
    torch.testing.assert_close(mine.decode(f, x), y, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("where", ["top", "sae"])
def test_run_of_sparsify_says_that_its_folders_are_transcoders(
    tmp_path: Path, load: Load, where: str
) -> None:
    folder = write_sparsify(tmp_path, module="layers.3.mlp", transcode=None)
    assert load(folder).card.hook == "blocks.3.mlp.hook_out"
    run = tmp_path / "config.json"
    run.write_text(json.dumps({"transcode": True} if where == "top" else {"sae": {"transcode": 1}}))
    card = load(folder).card
    # Those of that time subtracted b_dec from a transcoder's input as well.
    assert (card.kind, card.reads, card.apply_b_dec_to_input) == ("transcoder", READS, True)
    # Something else's, which says nothing.
    for content in ('{"transcode": false}', '{"model_type": "llama"}', "[1]", "{", '{"sae": 3}'):
        run.write_text(content)
        assert load(folder).card.hook == "blocks.3.mlp.hook_out"


# SAEs without a suite of their own


def test_attention_sae_is_read_at_the_heads(tmp_path: Path, load: Load) -> None:
    sae = load(write_attention_sae(tmp_path))
    card = sae.card
    assert (card.format, card.hook, card.d_in) == ("attention_saes", "blocks.3.attn.hook_z", D_IN)
    w = weights()
    assert_same_sae(
        sae,
        lambda x: relu(x - w["b_dec"], w),
        lambda f, _: f @ w["W_dec"] + w["b_dec"],
    )
    check_fits(card, d_model=D_IN + 4, num_layers=4)


def test_qresearch_sae_has_its_layer_in_its_name(tmp_path: Path, load: Load) -> None:
    sae = load(write_qresearch(tmp_path))
    assert (sae.card.format, sae.card.hook) == ("qresearch", "blocks.3.hook_resid_post")
    w = weights()
    assert_same_sae(sae, lambda x: relu(x, w), lambda f, _: f @ w["W_dec"] + w["b_dec"])


# Places


def test_neighbours_in_a_clt_are_by_what_is_written_in_all(tmp_path: Path, load: Load) -> None:
    sae = load(write_circuit_tracer_clt(tmp_path), layer="4")
    written = torch.nn.functional.normalize(decoders(2, seed=4).sum(dim=1), dim=1)
    cosines = written @ written[7]
    cosines[7] = -2
    best = cosines.topk(3)
    found = nearest(sae, 7, 3)
    assert [latent for latent, _ in found] == best.indices.tolist()
    assert [cosine for _, cosine in found] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_stated_places_must_be_those_of_the_files(tmp_path: Path, load: Load) -> None:
    folder = write_gemma_scope_2_transcoder(tmp_path)
    assert load(folder, reads="model.layers.3.mlp.input", writes=WRITES).card.reads == READS
    with pytest.raises(SAEError, match=r"reads=blocks.3.hook_resid_mid contradicts"):
        load(folder, reads="blocks.3.hook_resid_mid")
    with pytest.raises(SAEError, match="state layer= alone"):
        load(write_gemma_scope_2_clt(tmp_path / "clt"), layer="4", reads=READS)


def test_width_and_depth_of_every_place_must_be_the_model_s(tmp_path: Path, load: Load) -> None:
    card = load(write_circuit_tracer_clt(tmp_path), layer="4").card
    check_fits(card, d_model=D_IN, num_layers=LAYERS)
    with pytest.raises(SAEError, match="layer 5 does not exist, the model has layers 0 to 4"):
        check_fits(card, d_model=D_IN, num_layers=5)
