"""SAELens' transcoders against their library, and the places of every format's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.errors import SAEError
from sae.layers import resolve_all
from sae.neighbours import nearest
from sae.sae import SAE, check_fits, open_sae
from sae.source import SAEReference
from sae.weights import Weights
from tests.sae.formulas import READS, WRITES, assert_transcoder, jumprelu, relu
from tests.sae.oracles import oracle
from tests.sae.other_suites import (
    LAYERS,
    decoders,
    write_circuit_tracer,
    write_circuit_tracer_clt,
    write_crosscoder,
    write_gemma_scope_2_clt,
    write_gemma_scope_2_transcoder,
    write_sae_lens_transcoder,
)
from tests.sae.suites import D_IN, inputs

Load = Callable[..., SAE]


@pytest.mark.usefixtures("quiet")
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


def test_neighbours_in_a_clt_are_by_what_is_written_in_all(tmp_path: Path, load: Load) -> None:
    sae = load(write_circuit_tracer_clt(tmp_path), layer="4")
    written = torch.nn.functional.normalize(decoders(2, seed=4).sum(dim=1), dim=1)
    cosines = written @ written[7]
    cosines[7] = -2
    best = cosines.topk(3)
    found = nearest(sae, 7, 3)
    assert [latent for latent, _ in found] == best.indices.tolist()
    assert [cosine for _, cosine in found] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_what_a_clt_writes_is_the_sum_over_its_places(tmp_path: Path, load: Load) -> None:
    sae = load(write_circuit_tracer_clt(tmp_path), layer="4")
    torch.testing.assert_close(sae.written_by([7, 2]), decoders(2, seed=4)[[7, 2]].sum(dim=1))
    torch.testing.assert_close(sae.written_by(range(3)), sae.decoder_rows(0, 3))


def test_bad_weight_at_any_place_of_writing_is_found_by_its_row(tmp_path: Path, load: Load) -> None:
    folder = write_circuit_tracer_clt(tmp_path)
    path = folder / "W_dec_4.safetensors"
    decoder = load_file(path)
    decoder["W_dec_4"][3, 1, 2], decoder["W_dec_4"][5, 0, 0] = torch.inf, torch.nan
    save_file(decoder, path)
    assert load(folder, layer="4").nonfinite_latents(range(8)) == [3, 5]


@pytest.mark.parametrize(
    ("reads", "writes", "what"),
    [
        ("blocks.3.hook_resid_mid", "blocks.2.hook_mlp_out", "an earlier layer"),
        ("blocks.3.hook_mlp_out", "blocks.3.hook_resid_mid", "an earlier place of that layer"),
        ("blocks.3.mlp.hook_in", "blocks.3.hook_attn_out", "an earlier place of that layer"),
        ("blocks.3.hook_mlp_out", "blocks.3.mlp.hook_out", "an earlier place of that layer"),
    ],
)
def test_what_writes_before_it_reads_is_refused(
    tmp_path: Path, load: Load, reads: str, writes: str, what: str
) -> None:
    metadata = {"hook_name": reads, "hook_name_out": writes}
    folder = write_sae_lens_transcoder(tmp_path / "t", "transcoder", metadata)
    with pytest.raises(SAEError, match=f"reads at {reads} and writes at {writes}, {what}$"):
        load(folder)


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


def test_a_pass_brings_nothing_of_what_is_on_the_device(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcoder = load(write_sae_lens_transcoder(tmp_path / "t", "skip_transcoder"))
    x = inputs()
    f = transcoder.encode(x)
    expected = transcoder.decode(f, x)
    stored = transcoder.matrix_bytes
    assert stored == 4 * (2 * D_IN * transcoder.card.d_sae + D_IN * D_IN)
    place = torch.empty(transcoder.place_bytes, dtype=torch.uint8)
    transcoder.resident("cpu", place)
    transcoder.prepare("cpu")
    # Whatever else is read comes from the file, which an accelerator waits for.
    monkeypatch.setattr(Weights, "_stored", lambda self, name: pytest.fail(f"read {name}"))
    torch.testing.assert_close(transcoder.decode(transcoder.encode(x), x), expected)
