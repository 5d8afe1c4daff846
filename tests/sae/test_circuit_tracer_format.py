"""circuit-tracer's sets: a transcoder a layer, and cross-layer transcoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.errors import SAEError
from sae.sae import SAE
from tests.sae.formulas import READS, WRITES, assert_transcoder, jumprelu, relu
from tests.sae.other_suites import (
    decoders,
    write_circuit_tracer,
    write_circuit_tracer_clt,
    write_set_config,
)
from tests.sae.suites import inputs, weights

Load = Callable[..., SAE]


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


def test_circuit_tracer_s_set_of_files_elsewhere_says_to_name_them(
    tmp_path: Path, load: Load
) -> None:
    listed = {"transcoders": ["hf://google/gemma-scope-2-270m-pt/transcoder_all/layer_0"]}
    write_set_config(tmp_path, "transcoder_set", listed)
    with pytest.raises(SAEError, match=r"config\.yaml describes a set whose weights lie elsewhere"):
        load(tmp_path, layer="0")


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
    for said, what in (
        ({"activation": "topk", "k": 3}, "chooses its top k"),
        ({"activation": "gelu"}, None if threshold else "unknown activation 'gelu'"),
        ({"activation": "jumprelu"}, None if threshold else "with threshold_4 in W_enc_4"),
        ({"activation": "relu"}, None),
    ):
        places = {"feature_input_hook": "hook_resid_mid"}
        write_set_config(folder, "cross_layer_transcoder", places | said)
        if what is None or (threshold and "k" in said):
            assert load(folder, layer="4").card.architecture == card.architecture
        else:
            with pytest.raises(SAEError, match=what):
                load(folder, layer="4")
    before = load(folder, layer="4").sha256()
    decoder = load_file(folder / "W_dec_4.safetensors")
    decoder["W_dec_4"][3, 1, 2] = torch.inf
    save_file(decoder, folder / "W_dec_4.safetensors")
    changed = load(folder, layer="4")
    assert changed.sha256() != before
    with pytest.raises(SAEError, match="W_dec_4 of feature 3 has a value that is not finite"):
        changed.scan_nonfinite()
    (folder / "W_dec_4.safetensors").unlink()
    with pytest.raises(
        SAEError, match=r"W_dec_4\.safetensors, which holds the decoder, is not beside it"
    ):
        load(folder, layer="4")
