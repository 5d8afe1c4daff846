"""Files that are no SAE that can be used, and what each is refused with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae.errors import SAEError
from sae.sae import SAE, open_sae
from sae.source import SAEReference
from tests.sae.any_json import JSON
from tests.sae.suites import (
    D_SAE,
    inputs,
    sae_lens_config,
    sae_lens_tensors,
    write_sae_lens,
)

# Misfits, one readable line each


def refusal(source: Path, **stated: str) -> str:
    options = "".join(f",{key}={value}" for key, value in stated.items())
    with pytest.raises(SAEError) as caught:
        open_sae(SAEReference.parse(f"l3={source}{options}"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = sae_lens_tensors()
    del tensors["threshold"]
    assert "missing tensor threshold" in refusal(write_sae_lens(tmp_path, tensors=tensors))


def test_unexpected_tensor_is_named(tmp_path: Path) -> None:
    folder = write_sae_lens(
        tmp_path, config=sae_lens_config("standard"), tensors=sae_lens_tensors()
    )
    assert "unexpected tensor threshold in a sae_lens SAE of architecture standard" in refusal(
        folder
    )


def test_swapped_orientation_is_refused_with_both_shapes(tmp_path: Path) -> None:
    tensors = sae_lens_tensors()
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    message = refusal(write_sae_lens(tmp_path, tensors=tensors))
    assert "W_enc is [40, 12], expected [12, 40] (d_in 12, d_sae 40)" in message


def test_configuration_of_another_width_is_refused(tmp_path: Path) -> None:
    folder = write_sae_lens(tmp_path, config=sae_lens_config(d_in=13))
    assert "expected [13, 40]" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_dtype_that_is_no_float_is_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = sae_lens_tensors()
    tensors["W_dec"] = tensors["W_dec"].to(dtype)
    message = refusal(write_sae_lens(tmp_path, tensors=tensors))
    assert "W_dec has dtype" in message
    assert "expected one of float32, float16, bfloat16, float64" in message


def test_missing_configuration_is_refused(tmp_path: Path) -> None:
    folder = write_sae_lens(tmp_path)
    (folder / "cfg.json").unlink()
    assert "missing configuration: no cfg.json beside it" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\x00", "[" * 100_000, '{"d_in": NaN}'])
def test_configuration_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    folder = write_sae_lens(tmp_path)
    (folder / "cfg.json").write_text(content)
    refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "temporal"}, "a temporal SAE attends over the sequence"),
        ({"architecture": "batchtopk"}, "unknown architecture 'batchtopk'"),
        ({"architecture": 3}, "architecture must be a string"),
        ({"architecture": "skip_transcoder"}, "where this transcoder reads and writes"),
        ({"architecture": "gated_transcoder"}, "unknown architecture 'gated_transcoder'"),
        ({"hook_name_out": "blocks.3.hook_mlp_out"}, "so this is a transcoder; as a file of"),
        ({"d_in": None}, "d_in must be a positive integer, got None"),
        ({"d_sae": 40.0}, "d_sae must be a positive integer, got 40.0"),
        ({"d_sae": True}, "d_sae must be a positive integer, got True"),
        ({"d_in": -12}, "d_in must be a positive integer"),
        ({"normalize_activations": "zscore"}, "unknown normalize_activations 'zscore'"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input must be true or false"),
        ({"activation_fn": "tanh-relu"}, "unknown activation_fn 'tanh-relu'"),
        ({"metadata": {"hook_name": "blocks.3.mlp.hook_post"}}, "neurons of the MLP are not"),
        ({"metadata": []}, "metadata must be an object"),
        ({"hook_layer": 4}, "hook_layer is 4, the hook is blocks.3.hook_resid_post"),
        ({"sink_norm": -1}, "sink_norm must be a positive finite number"),
        ({"sink_norm": "2000"}, "cfg.json: sink_norm must be a positive finite number, got '2000'"),
    ],
)
def test_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in refusal(write_sae_lens(tmp_path, config=sae_lens_config(**changes)))


@pytest.mark.parametrize("k", [0, 41, "5", None])
def test_k_outside_of_the_latents_is_refused(tmp_path: Path, k: object) -> None:
    folder = write_sae_lens(tmp_path, "topk", config=sae_lens_config("topk", k=k))
    assert "k " in refusal(folder)


def test_hook_that_nobody_states_is_refused_with_the_way_to_state_it(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    folder = write_sae_lens(tmp_path, config=sae_lens_config(metadata={}))
    assert "state it as" in refusal(folder)
    assert "hook=blocks.LAYER" in refusal(folder)
    assert load(folder, hook="blocks.5.hook_resid_pre").card.hook == "blocks.5.hook_resid_pre"


def test_hook_that_contradicts_the_configuration_is_refused(tmp_path: Path) -> None:
    message = refusal(write_sae_lens(tmp_path), hook="blocks.4.hook_resid_post")
    assert "contradicts the configuration's blocks.3.hook_resid_post" in message


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "no weight file in it" in refusal(tmp_path)


def test_folder_with_two_weight_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("one.safetensors", "other.safetensors"):
        save_file(sae_lens_tensors(), tmp_path / name)
    assert "2 weight files (one.safetensors, other.safetensors, ...)" in refusal(tmp_path)
    for name in ("ae.pt", "sae_weights.safetensors"):
        save_file(sae_lens_tensors(), tmp_path / name)
    assert "4 weight files (ae.pt, one.safetensors, " in refusal(tmp_path)


def test_weight_file_under_a_published_name_is_taken_before_others(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    folder = write_sae_lens(tmp_path)
    save_file({"probe": torch.zeros(3)}, folder / "another.safetensors")
    assert load(folder).card.d_sae == D_SAE


def test_checkpoint_of_sae_lens_is_its_weights(tmp_path: Path, load: Callable[..., SAE]) -> None:
    folder = write_sae_lens(tmp_path)
    (folder / "sae_weights.safetensors").rename(folder / "renamed.safetensors")
    for name in ("activations_store_state", "activation_whitening", "sparsity"):
        save_file({"state": torch.zeros(3)}, folder / f"{name}.safetensors")
    torch.save({"optimizer": {}}, folder / "trainer_state.pt")
    assert load(folder).card.d_sae == D_SAE


def test_sparsity_statistics_are_no_second_weight_file(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    folder = write_sae_lens(tmp_path)
    save_file({"sparsity": torch.zeros(D_SAE)}, folder / "sparsity.safetensors")
    assert load(folder).card.d_sae == D_SAE


def test_file_of_something_else_is_refused_with_its_tensors(tmp_path: Path) -> None:
    save_file({name: torch.zeros(3) for name in ("lm_head", "norm")}, tmp_path / "m.safetensors")
    assert "not a known format of an SAE (tensors: lm_head, norm)" in refusal(tmp_path)


# Damage


def test_bad_decoder_bias_is_refused_at_once(tmp_path: Path) -> None:
    tensors = sae_lens_tensors()
    tensors["b_dec"][3] = float("nan")
    assert "b_dec has a value that is not finite" in refusal(
        write_sae_lens(tmp_path, tensors=tensors)
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_weight_file_is_refused_or_reads_as_an_sae(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_sae_lens(tmp_path_factory.mktemp("sae"))
    path = folder / "sae_weights.safetensors"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content) - 1), label="length") :]
    else:
        for _ in range(data.draw(st.integers(1, 4), label="bytes")):
            # Mostly the header, where damage changes meanings rather than numbers.
            place = data.draw(st.integers(0, min(600, len(content) - 1)), label="place")
            content[place] = data.draw(st.integers(0, 255), label="byte")
    path.write_bytes(bytes(content))
    try:
        sae = open_sae(SAEReference.parse(f"l3={folder}"))
        sae.scan_nonfinite()
    except SAEError as error:
        assert "\n" not in str(error)
    else:
        sae.encode(inputs())


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from([*sae_lens_config("topk"), "hook_name", "activation_fn"]), value=JSON)
def test_any_value_in_the_configuration_is_refused_or_understood(
    key: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_sae_lens(tmp_path_factory.mktemp("sae"), "topk")
    config = sae_lens_config("topk") | {key: value}
    (folder / "cfg.json").write_text(json.dumps(config))
    try:
        sae = open_sae(SAEReference.parse(f"l3={folder}"))
    except SAEError as error:
        assert "\n" not in str(error)
    else:
        sae.encode(inputs())
