"""Weight files of every container: read without executing anything, and refused when damaged."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae.errors import SAEError
from sae.sae import SAE, open_sae
from sae.source import SAEReference
from sae.tensors import open_tensors
from sae.tensors.npz_file import FREE_BYTES
from tests.sae.suites import (
    D_SAE,
    HOOK,
    inputs,
    weights,
    write_dictionary_learning,
    write_gemma_scope,
    write_goodfire,
    write_qwen_scope,
)

# Untyped in NumPy.
NPY: Any = np.lib.format
SAVEZ: Any = np.savez


def refusal(path: Path) -> str:
    with pytest.raises(SAEError) as caught:
        open_tensors(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


class Executes:
    """An object whose unpickling writes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.proof, "executed")


def test_the_proof_of_execution_works(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Executes(proof)))
    assert proof.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_a_side_effect_executes_nothing(tmp_path: Path, zipped: bool) -> None:
    proof, path = tmp_path / "proof", tmp_path / "ae.pt"
    content = {"W_enc": torch.zeros(2, 3), "payload": Executes(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refusal(path)
    assert not proof.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_bare_pickle_executes_nothing(tmp_path: Path, protocol: int) -> None:
    proof, path = tmp_path / "proof", tmp_path / "ae.pt"
    path.write_bytes(pickle.dumps(Executes(proof), protocol=protocol))
    refusal(path)
    assert not proof.exists()


@pytest.mark.parametrize("compress_type", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_pickled_array_in_an_npz_executes_nothing(tmp_path: Path, compress_type: int) -> None:
    proof = tmp_path / "proof"
    folder = write_gemma_scope(tmp_path)
    array = np.array([Executes(proof)], dtype=object)
    buffer = io.BytesIO()
    NPY.write_array(buffer, array, allow_pickle=True)
    canonical = weights()
    with zipfile.ZipFile(folder / "params.npz", "w", compress_type) as archive:
        archive.writestr("w_enc.npy", buffer.getvalue())
        for name in ("w_dec", "b_enc", "b_dec", "threshold"):
            plain = io.BytesIO()
            stored = canonical["W_dec" if name == "w_dec" else name]
            NPY.write_array(plain, stored.numpy())
            archive.writestr(f"{name}.npy", plain.getvalue())
    with pytest.raises(SAEError, match="w_enc"):
        open_sae(SAEReference.parse(f"x={folder}"))
    assert not proof.exists()


def test_legacy_torch_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "ae.pt"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    assert "save it again with a current torch.save, or as safetensors" in refusal(path)


def test_torch_file_that_is_no_dictionary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ae.pt"
    torch.save([torch.zeros(2)], path)
    assert "holds list, expected named tensors" in refusal(path)


def test_tensor_that_repeats_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ae.pt"
    torch.save({"W_enc": torch.zeros(1).expand(10**6, 10**6)}, path)
    assert "W_enc is [1000000, 1000000], more than its storage holds" in refusal(path)


def test_sparse_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ae.pt"
    torch.save({"W_enc": torch.eye(3).to_sparse()}, path)
    refusal(path)


def test_torch_file_is_told_by_content_under_the_suffix_of_another(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.save({"a": torch.arange(3.0)}, path)
    file = open_tensors(path)
    assert file.container == "torch"
    path.unlink()
    assert torch.equal(file.tensor("a"), torch.arange(3.0))


def test_compressed_torch_archive_is_refused(tmp_path: Path) -> None:
    path = write_goodfire(tmp_path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert "is compressed, as torch.save never does" in refusal(path)


def test_archive_of_a_later_version_of_zip_is_refused(tmp_path: Path) -> None:
    for path in (write_goodfire(tmp_path), write_gemma_scope(tmp_path) / "params.npz"):
        content = bytearray(path.read_bytes())
        entry = content.index(b"PK\x01\x02")
        content[entry + 6] = 99  # "version needed to extract" of the first entry
        path.write_bytes(content)
        assert "damaged archive: zip file version 9.9" in refusal(path)


def test_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "an archive without arrays or tensors" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04", b"not weights at all", b"\x80"])
def test_file_that_is_no_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    refusal(path)


def npy(shape: tuple[int, ...], data: bytes, dtype: str = "<f4") -> bytes:
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    NPY.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + data


def test_zip_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "params.npz"
    size = 2 * FREE_BYTES
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("w_enc.npy", npy((size // 4,), bytes(size)))
    assert path.stat().st_size < size / 64
    monkeypatch.delattr(zipfile.ZipFile, "open")
    assert "more than 64 times" in refusal(path)


@pytest.mark.parametrize("shape", [(10**12,), (3,), (-2, -2), (2**63, 4), (5, 0)])
def test_array_that_declares_another_size_is_refused(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "params.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w_enc.npy", npy(shape, bytes(16)))
    refusal(path)


@pytest.mark.parametrize("dtype", ["<i4", ">f4", "<c8", "<M8[s]"])
def test_array_of_another_dtype_is_refused_by_name(tmp_path: Path, dtype: str) -> None:
    folder = write_gemma_scope(tmp_path)
    arrays = dict(np.load(folder / "params.npz"))
    arrays["w_dec"] = arrays["w_dec"].astype(np.int64).astype(dtype)
    SAVEZ(folder / "params.npz", **arrays)
    with pytest.raises(SAEError, match="w_dec has dtype"):
        open_sae(SAEReference.parse(f"x={folder}"))


def test_keys_that_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    folder = write_gemma_scope(tmp_path)
    arrays = dict(np.load(folder / "params.npz"))
    SAVEZ(folder / "params.npz", W_enc=arrays["w_enc"], **arrays)
    with pytest.raises(SAEError, match="W_enc and w_enc differ in case alone"):
        open_sae(SAEReference.parse(f"x={folder}"))


def test_array_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            archive.writestr("w_enc.npy", npy((4,), bytes(16)))
    assert "w_enc is stored twice" in refusal(path)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz_array_reads_in_either_order_and_at_any_offset(
    tmp_path: Path, order: Any, compressed: bool
) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).copy(order=order)
    save = np.savez_compressed if compressed else np.savez
    for name in ("a", "ab", "abc", "abcd"):  # the name's length moves the data
        pairs: Any = {name: array}
        save(tmp_path / f"{name}.npz", **pairs)
        file = open_tensors(tmp_path / f"{name}.npz")
        assert file.headers[name].shape == (3, 4)
        tensor = file.tensor(name)
        assert torch.equal(tensor, torch.from_numpy(np.array(array)))
        assert torch.equal(tensor @ torch.ones(4), torch.tensor([6.0, 22.0, 38.0]))


def test_stored_npz_is_mapped_and_compressed_is_not(tmp_path: Path) -> None:
    stored, packed = tmp_path / "stored.npz", tmp_path / "packed.npz"
    array = np.zeros(1000, dtype=np.float32)
    np.savez(stored, a=array)
    np.savez_compressed(packed, a=array)
    tensors = [open_tensors(path).tensor("a") for path in (stored, packed)]
    mapped = Path("/proc/self/maps").read_text()
    assert str(stored) in mapped
    assert str(packed) not in mapped
    assert torch.equal(*tensors)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "npz": lambda root: write_gemma_scope(root) / "params.npz",
    "compressed npz": lambda root: write_gemma_scope(root, compressed=True) / "params.npz",
    "torch": write_qwen_scope,
    "torch with scalars": lambda root: write_dictionary_learning(root, "AutoEncoderTopK") / "ae.pt",
}


@settings(max_examples=250, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(WRITERS)))
def test_damaged_archive_is_refused_or_reads_as_an_sae(
    data: st.DataObject, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = WRITERS[name](tmp_path_factory.mktemp("sae"))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content) - 1), label="length") :]
    else:
        for _ in range(data.draw(st.integers(1, 4), label="bytes")):
            # The headers of an archive are at both of its ends.
            place = data.draw(st.integers(-900, 899), label="place")
            content[place] = data.draw(st.integers(0, 255), label="byte")
    path.write_bytes(bytes(content))
    try:
        sae: SAE = open_sae(SAEReference.parse(f"x={path}"))
        sae.scan_nonfinite()
    except SAEError as error:
        assert "\n" not in str(error)
    else:
        assert (sae.card.hook, sae.card.d_sae) == (HOOK, D_SAE)
        sae.encode(inputs())


# A file that changes while it is open


def write_safetensors(path: Path) -> Path:
    save_file({"W": torch.arange(4096.0)}, path)
    return path


def write_torch(path: Path) -> Path:
    torch.save({"W": torch.arange(4096.0)}, path)
    return path


def write_npz(path: Path) -> Path:
    with path.open("wb") as file:
        SAVEZ(file, W=np.arange(4096.0))
    return path


CONTAINERS = {"safetensors": write_safetensors, "torch": write_torch, "npz": write_npz}


@pytest.fixture(params=CONTAINERS)
def weight_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return CONTAINERS[request.param](tmp_path / "weights")


def test_untouched_file_is_not_refused(weight_file: Path) -> None:
    opened = open_tensors(weight_file)
    weight_file.chmod(0o600)
    opened.refuse_changed()
    assert opened.sha256() == hashlib.sha256(weight_file.read_bytes()).hexdigest()
    assert opened.sha256() == opened.sha256()


def test_truncated_file_is_refused_before_it_is_read_past_its_end(weight_file: Path) -> None:
    opened = open_tensors(weight_file)
    os.truncate(weight_file, 100)
    with pytest.raises(SAEError, match="changed on disk"):
        opened.refuse_changed()
    with pytest.raises(SAEError, match="changed on disk"):
        opened.sha256()


def test_file_written_over_in_place_is_refused(weight_file: Path) -> None:
    opened = open_tensors(weight_file)
    content = weight_file.read_bytes()
    os.utime(weight_file, ns=(0, 0))  # a clock too coarse to tell the two apart
    weight_file.write_bytes(content[:-1] + b"\1")
    with pytest.raises(SAEError, match="changed on disk"):
        opened.refuse_changed()


@pytest.mark.parametrize("replaced", [True, False])
def test_deleted_or_replaced_file_stays_what_it_was(weight_file: Path, replaced: bool) -> None:
    opened = open_tensors(weight_file)
    digest = opened.sha256()
    weight_file.unlink()
    if replaced:
        weight_file.write_bytes(b"something else")
    opened.refuse_changed()
    assert opened.sha256() == digest
    assert torch.equal(opened.tensor("W").float(), torch.arange(4096.0))
