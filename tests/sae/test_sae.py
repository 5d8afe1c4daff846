from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sae.sae as sae_module
import sae.weights as weights_module
from sae.errors import SAEError
from sae.sae import SAE, open_sae
from sae.source import SAEReference
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
