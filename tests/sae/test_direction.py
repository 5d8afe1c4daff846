"""Directions: control vectors of GGUF, and vectors alone in a file."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae.errors import SAEError
from sae.layers import resolve_all
from sae.sae import SAE, open_sae
from sae.solve import solve
from sae.source import SAEReference, parse_source
from tests.sae.control_vectors import write_gguf
from tests.sae.suites import D_IN, HOOK, inputs

Load = Callable[..., SAE]


def vectors(*layers: int) -> dict[int, Tensor]:
    random = torch.Generator().manual_seed(5)
    return {layer: 3 * torch.randn(D_IN, generator=random) for layer in layers}


def write_named(path: Path, by_layer: Mapping[int, Tensor]) -> Path:
    save_file({f"direction.{layer}": vector for layer, vector in by_layer.items()}, path)
    return path


def alone(path: Path, tensor: Tensor) -> Path:
    """The tensor, and nothing beside it, in the file that the suffix says."""
    if path.suffix == ".safetensors":
        save_file({"vector": tensor}, path)
    elif path.suffix == ".npy":
        np.save(path, tensor.numpy())
    else:
        torch.save({"vector": tensor} if path.suffix == ".pth" else tensor, path)
    return path


@pytest.mark.parametrize("write", [write_gguf, write_named])
def test_direction_of_a_layer_is_at_that_block_s_output_and_signed(
    tmp_path: Path, load: Load, write: Callable[..., Path]
) -> None:
    by_layer = vectors(1, 3, 11)
    sae = load(write(tmp_path / f"v.{write.__name__.removeprefix('write_')}", by_layer), layer="3")
    card = sae.card
    assert (card.kind, card.architecture, card.format) == ("direction",) * 2 + ("direction",)
    assert (card.hook, card.layer, card.d_in, card.d_sae) == (HOOK, 3, D_IN, 1)
    assert not card.error_term
    v = by_layer[3].double()
    x = inputs()
    wanted = (x.double() @ (v / v.norm())).float()[:, None]
    assert (wanted < 0).any()
    torch.testing.assert_close(sae.encode(x), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.activations(x, [0]), wanted, atol=1e-5, rtol=1e-5)
    rows = sae.rows([0])
    assert torch.equal(rows.W_enc, rows.W_dec)
    assert float(rows.threshold) == -torch.inf
    assert rows.decoder_scale.tolist() == [1.0]


def test_adding_its_maximum_activation_adds_the_vector_as_it_was_made(
    tmp_path: Path, load: Load
) -> None:
    by_layer = vectors(2)
    sae = load(write_gguf(tmp_path / "v.gguf", by_layer))
    maximum = sae.open_features().max_activation(0)
    assert maximum is not None
    assert sae.card.has_max_activations
    torch.testing.assert_close(maximum * sae.rows([0]).W_dec[0], by_layer[2])


def test_labels_beside_it_do_not_change_its_length(tmp_path: Path, load: Load) -> None:
    path = alone(tmp_path / "v.npy", torch.eye(D_IN)[:3] * 4)
    (tmp_path / "features.jsonl").write_text(
        '{"index": 1, "label": "calm", "max_activation": 9}\n{"index": 2, "density": 0.5}\n'
    )
    features = load(path, hook=HOOK).open_features()
    assert features.label(1) == "calm"
    assert [features.max_activation(i) for i in range(3)] == [4.0, 4.0, 4.0]
    assert [f.index for f in features.page(3, 0, "max_activation")[0]] == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".pt", ".pth"])
@pytest.mark.parametrize("shape", [(D_IN,), (4, D_IN)])
def test_tensor_alone_is_a_direction_a_row(
    tmp_path: Path, load: Load, suffix: str, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    path = alone(tmp_path / f"v{suffix}", tensor)
    with pytest.raises(SAEError, match=r"hook point is stated nowhere; state it as .*,hook="):
        load(path)
    sae = load(path, hook="model.layers.3")
    rows = tensor.reshape(-1, D_IN)
    assert sae.card.hook == HOOK
    assert sae.card.d_sae == len(rows)
    torch.testing.assert_close(
        sae.rows(range(len(rows))).W_dec, torch.nn.functional.normalize(rows, dim=1)
    )
    torch.testing.assert_close(
        torch.tensor([sae.open_features().max_activation(i) for i in range(len(rows))]),
        rows.norm(dim=1),
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_gguf_of_other_floats_is_read(tmp_path: Path, load: Load, dtype: Any) -> None:
    by_layer = {3: torch.arange(1, D_IN + 1).float()}
    sae = load(write_gguf(tmp_path / "v.gguf", by_layer, dtype))
    assert sae.card.dtype == np.dtype(dtype).name
    assert sae.open_features().max_activation(0) == pytest.approx(float(by_layer[3].norm()))


def test_gguf_of_bfloat16_is_read(tmp_path: Path, load: Load) -> None:
    vector = torch.arange(1, D_IN + 1).bfloat16()
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_tensor(
        "direction.3",
        vector.view(torch.uint8).numpy(),
        raw_dtype=gguf.GGMLQuantizationType.BF16,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sae = load(tmp_path / "v.gguf")
    assert sae.card.dtype == "bfloat16"
    torch.testing.assert_close(
        sae.rows([0]).W_dec[0], torch.nn.functional.normalize(vector.float(), dim=0)
    )


def test_all_layers_are_a_dictionary_each(tmp_path: Path) -> None:
    by_layer = vectors(10, 2, 3)
    path = write_gguf(tmp_path / "v.gguf", by_layer)
    found = resolve_all(SAEReference.parse(f"calm={path},layer=all"))
    assert [ref.name for ref in found] == ["calm.2", "calm.3", "calm.10"]
    for ref in found:
        sae = open_sae(ref)
        assert sae.card.hook == f"blocks.{ref.layer}.hook_resid_post"
        assert ref.layer is not None
        torch.testing.assert_close(
            torch.tensor(sae.open_features().max_activation(0)), by_layer[ref.layer].norm()
        )


def test_layer_that_is_not_there_or_not_chosen_is_refused(tmp_path: Path, load: Load) -> None:
    path = write_gguf(tmp_path / "v.gguf", vectors(2, 3))
    with pytest.raises(SAEError, match=r"of 2 layers \(2, 3\); state which, as .*,layer=2"):
        load(path)
    with pytest.raises(SAEError, match="has no direction of layer 7, only of 2, 3"):
        load(path, layer="7")
    with pytest.raises(SAEError, match="contradicts"):
        load(path, layer="2", hook=HOOK)
    one = alone(tmp_path / "v.npy", torch.ones(D_IN))
    with pytest.raises(SAEError, match="layer=7 is stated, but this direction belongs to layer 3"):
        load(one, hook=HOOK, layer="7")
    assert load(one, hook=HOOK, layer="3").card.layer == 3
    with pytest.raises(SAEError, match="layer=all needs a source of several layers"):
        resolve_all(parse_source(f"{one},hook={HOOK},layer=all"))


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.zeros(D_IN), "is zero or has a value that is not finite"),
        (torch.full((2, D_IN), torch.nan), "of feature 0 is zero or has a value"),
        (torch.ones(2, 3, D_IN), "expected \\[d\\] or \\[n, d\\]"),
        (torch.ones(D_IN, dtype=torch.int32), "has dtype int32"),
    ],
)
def test_what_has_no_direction_is_refused(
    tmp_path: Path, load: Load, tensor: Tensor, what: str
) -> None:
    path = alone(tmp_path / "v.npy", tensor)
    with pytest.raises(SAEError, match=what):
        load(path, hook=HOOK).scan_nonfinite()


def test_gguf_of_a_model_is_refused(tmp_path: Path, load: Load) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 4), dtype=np.float32))
    writer.add_tensor("blk.1.attn_q.weight", np.ones((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SAEError, match=r"no directions: expected tensors named direction\.LAYER"):
        load(tmp_path / "model.gguf")


def test_damaged_gguf_is_refused_wherever_it_ends(tmp_path: Path, load: Load) -> None:
    content = write_gguf(tmp_path / "v.gguf", vectors(3)).read_bytes()
    path = tmp_path / "cut.gguf"
    for end in range(4, len(content) - 32, 7):
        path.write_bytes(content[:end])
        with pytest.raises(SAEError, match=r"truncated|damaged|no weight file"):
            load(path)
    for place, value in ((4, 99), (8, 2**20), (16, 2**60)):
        broken = bytearray(content)
        struct.pack_into("<I" if place == 4 else "<Q", broken, place, value)
        path.write_bytes(broken)
        with pytest.raises(SAEError, match="damaged GGUF file"):
            load(path)


def test_gguf_whose_keys_declare_more_than_it_holds_is_refused(tmp_path: Path, load: Load) -> None:
    content = write_gguf(tmp_path / "v.gguf", vectors(3)).read_bytes()
    _, _, tensors, keys = struct.unpack_from("<4sIQQ", content)
    array, uint8, string = 9, 0, 8
    for element in (uint8, string):
        key = struct.pack("<Q1sIIQ", 1, b"k", array, element, 2**40)
        broken = struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys + 1) + key + content[24:]
        (tmp_path / "v.gguf").write_bytes(broken)
        with pytest.raises(SAEError, match="damaged GGUF file"):
            load(tmp_path / "v.gguf")


def test_quantized_gguf_is_refused_by_its_type(tmp_path: Path, load: Load) -> None:
    content = bytearray(write_gguf(tmp_path / "v.gguf", vectors(3)).read_bytes())
    name = content.index(b"direction.3") + len(b"direction.3")
    struct.pack_into("<I", content, name + 4 + 8, 8)  # past its rank and its one dimension
    (tmp_path / "v.gguf").write_bytes(content)
    with pytest.raises(SAEError, match="dtype of GGUF's type 8, expected one of float32"):
        load(tmp_path / "v.gguf")


def test_vectors_beside_other_weights_are_not_taken_for_them(tmp_path: Path, load: Load) -> None:
    from tests.sae.suites import write_sae_lens

    folder = write_sae_lens(tmp_path / "sae")
    np.save(folder / "mean.npy", np.ones(D_IN, dtype=np.float32))
    assert load(folder).card.format == "sae_lens"


def test_solved_rows_of_two_directions_reread_what_is_asked(tmp_path: Path, load: Load) -> None:
    tensor = torch.randn(2, D_IN, generator=torch.Generator().manual_seed(2))
    sae = load(alone(tmp_path / "v.npy", tensor), hook=HOOK)
    solved = solve(sae, [0, 1], reread=True)
    x = inputs()
    f = sae.encode(x)
    wanted = torch.tensor([-2.0, 3.0])
    edited = x + (wanted - f) @ solved.W_dec
    torch.testing.assert_close(sae.encode(edited), wanted.expand(len(x), 2), atol=1e-4, rtol=1e-4)
