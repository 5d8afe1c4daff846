from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import sae.sae as sae_module
import sae.weights as weights_module
from sae.errors import SAEError
from sae.sae import SAE, open_sae
from sae.source import SAEReference
from tests.sae.any_json import JSON
from tests.sae.suites import (
    D_IN,
    D_SAE,
    HOOK,
    inputs,
    sae_lens_config,
    sae_lens_tensors,
    weights,
    write_sae_lens,
)

ARCHITECTURES = ("standard", "jumprelu", "gated", "topk", "abstopk")


@pytest.fixture(params=ARCHITECTURES)
def any_sae(request: pytest.FixtureRequest, tmp_path: Path, load: Callable[..., SAE]) -> SAE:
    return load(write_sae_lens(tmp_path / "sae", request.param))


def test_card_says_what_the_files_say(tmp_path: Path, load: Callable[..., SAE]) -> None:
    card = load(write_sae_lens(tmp_path / "sae")).card
    assert (card.id, card.hook, card.layer) == ("l3", HOOK, 3)
    assert (card.architecture, card.d_in, card.d_sae) == ("jumprelu", D_IN, D_SAE)
    assert (card.dtype, card.format, card.error_term) == ("float32", "sae_lens", True)
    assert card.source == str(tmp_path / "sae")
    assert (card.sha256, card.sink_norm) == (None, None)
    assert not card.has_labels
    assert not card.has_max_activations


def test_rows_are_float32_contiguous_and_in_the_order_asked(any_sae: SAE) -> None:
    rows = any_sae.rows([7, 0, 7])
    canonical = weights()
    assert torch.equal(rows.W_enc, canonical["W_enc"][[7, 0, 7]])
    assert torch.equal(rows.W_dec, canonical["W_dec"][[7, 0, 7]])
    for tensor in vars(rows).values():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert len(tensor) == 3


def test_rows_of_no_latents_are_empty(any_sae: SAE) -> None:
    assert any_sae.rows([]).W_enc.shape == (0, D_IN)
    assert any_sae.activations(inputs(), []).shape == (9, 0)


@pytest.mark.parametrize("latent", [-1, D_SAE, 10**12])
def test_latent_past_d_sae_is_an_index_error_with_the_limit(any_sae: SAE, latent: int) -> None:
    with pytest.raises(IndexError, match=rf"latent {latent} not in \[0, {D_SAE}\)"):
        any_sae.rows([0, latent])


def test_half_precision_weights_are_used_at_their_stored_values(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    stored = {name: tensor.bfloat16() for name, tensor in sae_lens_tensors().items()}
    half = load(write_sae_lens(tmp_path / "half", tensors=stored))
    exact = {name: tensor.float() for name, tensor in stored.items()}
    full = load(write_sae_lens(tmp_path / "full", tensors=exact))
    assert half.card.dtype == "bfloat16"
    assert torch.equal(half.encode(inputs()), full.encode(inputs()))


def test_chunked_passes_equal_whole_ones(any_sae: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs()
    f = any_sae.encode(x)
    x_hat = any_sae.decode(f, x)
    some = any_sae.activations(x, [3, 39])
    monkeypatch.setattr(weights_module, "WORKSPACE_BYTES", 4 * D_IN * 7)
    assert len(list(any_sae.chunks())) == 6
    torch.testing.assert_close(any_sae.encode(x), f)
    torch.testing.assert_close(any_sae.decode(f, x), x_hat, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(any_sae.activations(x, [3, 39]), some)
    any_sae.scan_nonfinite()


@pytest.mark.parametrize(("dtype", "products"), [(torch.float32, 1), (torch.bfloat16, 6)])
def test_encoder_is_multiplied_whole_if_nothing_is_copied(
    tmp_path: Path,
    load: Callable[..., SAE],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    products: int,
) -> None:
    tensors = {name: part.to(dtype) for name, part in sae_lens_tensors("topk").items()}
    sae = load(write_sae_lens(tmp_path / "sae", "topk", tensors=tensors))
    whole = sae.encode(inputs())
    widths: list[int] = []

    def counted(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        widths.append(len(rows))
        return x @ rows.T

    monkeypatch.setattr(weights_module, "WORKSPACE_BYTES", 4 * D_IN * 7)
    monkeypatch.setattr(sae_module, "product", counted)
    torch.testing.assert_close(sae.encode(inputs()), whole)
    assert len(widths) == products and sum(widths) == D_SAE


def test_activations_equal_the_columns_of_encode(any_sae: SAE) -> None:
    x = inputs()
    latents = list(range(D_SAE))[::-3]
    torch.testing.assert_close(any_sae.activations(x, latents), any_sae.encode(x)[:, latents])


def test_resident_weights_give_the_same_passes(any_sae: SAE) -> None:
    x = inputs()
    f = any_sae.encode(x)
    x_hat = any_sae.decode(f, x)
    any_sae.resident("cpu")
    torch.testing.assert_close(any_sae.encode(x), f)
    torch.testing.assert_close(any_sae.decode(f, x), x_hat)


def test_passes_follow_their_input_to_its_device(any_sae: SAE) -> None:
    # No number is computed on the meta device, but tensors of another one are refused.
    x = inputs().to("meta")
    f = any_sae.encode(x)
    assert (f.device.type, f.shape) == ("meta", (9, D_SAE))
    assert any_sae.decode(f, x).device.type == "meta"
    assert any_sae.activations(x, [3, 1]).shape == (9, 2)
    assert any_sae.decoder_rows(2, 5, "meta").device.type == "meta"
    any_sae.resident("meta")
    assert any_sae.decode(any_sae.encode(x), x).device.type == "meta"


def test_folding_b_dec_in_float64_survives_a_large_offset(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    tensors = sae_lens_tensors("standard")
    tensors["b_dec"] = tensors["b_dec"] * 1000
    sae = load(write_sae_lens(tmp_path / "sae", "standard", tensors=tensors))
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    shift = exact["b_enc"] - exact["b_dec"] @ exact["W_enc"]
    assert torch.equal(sae.rows(range(D_SAE)).bias, shift.float())


def test_decoder_norms_cover_all_latents(any_sae: SAE) -> None:
    torch.testing.assert_close(any_sae.decoder_row_norms(), weights()["W_dec"].norm(dim=1))


def test_checksum_is_of_the_weight_file_and_then_on_the_card(any_sae: SAE, tmp_path: Path) -> None:
    content = (tmp_path / "sae" / "sae_weights.safetensors").read_bytes()
    assert any_sae.sha256() == hashlib.sha256(content).hexdigest()
    assert any_sae.card.sha256 == any_sae.sha256()
    assert any_sae.weight_bytes == len(content)


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


def test_sink_norm_comes_from_the_configuration_unless_stated(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    folder = write_sae_lens(tmp_path, config=sae_lens_config(sink_norm=800))
    assert load(folder).card.sink_norm == 800.0
    assert load(folder, sink_norm="2000").card.sink_norm == 2000.0


# Weights that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tensor", ["W_enc", "W_dec", "b_enc", "threshold"])
def test_scan_names_the_tensor_and_the_first_feature(
    tmp_path: Path, load: Callable[..., SAE], tensor: str, bad: float
) -> None:
    tensors = sae_lens_tensors()
    for latent, row in ((31, 0), (17, 11)):
        if tensor == "W_enc":
            tensors[tensor][row, latent] = bad
        elif tensor == "W_dec":
            tensors[tensor][latent, row] = bad
        else:
            tensors[tensor][latent] = bad
    sae = load(write_sae_lens(tmp_path, tensors=tensors))
    with pytest.raises(SAEError, match=rf"{tensor} of feature 17 has a value that is not finite"):
        sae.scan_nonfinite()
    assert sae.nonfinite_latents([0, 31, 5, 17]) == [31, 17]
    assert sae.nonfinite_latents([0, 5]) == []


def test_bad_decoder_bias_is_refused_at_once(tmp_path: Path) -> None:
    tensors = sae_lens_tensors()
    tensors["b_dec"][3] = float("nan")
    assert "b_dec has a value that is not finite" in refusal(
        write_sae_lens(tmp_path, tensors=tensors)
    )


@pytest.mark.parametrize("tensor", ["W_enc", "W_dec", "b_enc", "threshold"])
def test_float64_too_large_for_float32_is_not_finite(
    tmp_path: Path, load: Callable[..., SAE], tensor: str
) -> None:
    tensors = {name: stored.double() for name, stored in sae_lens_tensors().items()}
    rows = tensors[tensor].T if tensor == "W_enc" else tensors[tensor]
    rows[17] = -1e300
    sae = load(write_sae_lens(tmp_path, tensors=tensors))
    with pytest.raises(SAEError, match=rf"{tensor} of feature 17 has a value that is not finite"):
        sae.scan_nonfinite()
    assert sae.nonfinite_latents([5, 17]) == [17]


@pytest.mark.parametrize("bad", [89.0, float("-inf"), float("nan")])
def test_gain_too_large_for_float32_is_not_finite(
    tmp_path: Path, load: Callable[..., SAE], bad: float
) -> None:
    tensors = sae_lens_tensors("gated")
    tensors["r_mag"][3] = 88.0  # exp(88) = 1.7e38, exp(89) = 4.5e38
    tensors["r_mag"][17] = bad
    sae = load(write_sae_lens(tmp_path, "gated", tensors=tensors))
    with pytest.raises(SAEError, match=r"r_mag of feature 17 .* whose exponential is not in float"):
        sae.scan_nonfinite()
    assert sae.nonfinite_latents([3, 17]) == [17]


def test_good_weights_pass_the_scan(any_sae: SAE) -> None:
    any_sae.scan_nonfinite()
    assert any_sae.nonfinite_latents(range(D_SAE)) == []


# Damage


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


# Cost


def write_sparse_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A file of zeros whose data the disk never holds; its size in bytes."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)
    return 8 + len(encoded) + offset


def anonymous_memory() -> int:
    """Bytes in memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


def resident_pages(path: Path) -> int:
    """Bytes of the file that are mapped and in memory, from /proc."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_opening_65k_latents_reads_the_header_not_the_weights(tmp_path: Path) -> None:
    d_in, d_sae = 4096, 65_536
    folder = write_sae_lens(tmp_path / "sae", config=sae_lens_config(d_in=d_in, d_sae=d_sae))
    path = folder / "sae_weights.safetensors"
    size = write_sparse_safetensors(
        path,
        {
            "W_enc": (d_in, d_sae),
            "W_dec": (d_sae, d_in),
            "b_enc": (d_sae,),
            "b_dec": (d_in,),
            "threshold": (d_sae,),
        },
    )
    assert size > 2 * 10**9
    assert os.stat(path).st_blocks * 512 < 10**6
    sae = open_sae(SAEReference.parse(f"l3={folder}"))
    assert resident_pages(path) < 4 * 2**20
    assert sae.weight_bytes == size
    # A row of W_enc lies across all of W_enc here; none of it is copied but the row.
    before = anonymous_memory()
    assert sae.rows([70, 65_000]).W_enc.shape == (2, d_in)
    assert anonymous_memory() - before < 16 * 2**20
