"""Which SAEs' whole weights are on the device, and whose they are in the place that takes turns.

The device is another one than the host's only by name (``meta``), or not at all: what is copied
where is seen on the host, whose copies are those of any device.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.errors import SAEError
from sae.sae import SAE, open_sae
from sae.source import ResolvedSAE
from steering.config import RESIDENT_ALL, RESIDENT_CHOICES, RESIDENT_NONE, RESIDENT_TURNS
from steering.report import features_read
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    OP_CLAMP,
    PlannedEdit,
    PlannedRead,
    SteeringPlan,
)
from steering.worker import batch_parts, residency
from steering.worker.ops import cpu_kernel
from steering.worker.residency import Residency
from tests.models import D_MODEL, make_tiny_sae
from tests.steering.tiny_worker import TinyWorker, tied_sae

HOST = torch.device("cpu")
LENGTH = 6
RELU, TOPK, SMALL = 0, 1, 2


@pytest.fixture
def saes(tmp_path: Path) -> dict[int, SAE]:
    """A JumpReLU SAE, a TopK one, and another JumpReLU one of half the size."""
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"architecture": "topk"},
        {"d_sae": 64, "seed": 5},
    )
    paths = [make_tiny_sae(tmp_path / str(i), **kind) for i, kind in enumerate(kinds)]
    return {
        i: open_sae(ResolvedSAE(str(i), str(path), path=str(path))) for i, path in enumerate(paths)
    }


def on_device(saes: dict[int, SAE], device: torch.device = HOST) -> set[int]:
    return {i for i, sae in saes.items() if device in sae._weights._resident}


def matrices(sae: SAE) -> tuple[Tensor, Tensor]:
    resident = sae._weights._resident[HOST]
    return resident["W_enc"], resident["W_dec"]


def test_topk_saes_are_put_on_the_device_at_once_and_stay(saes: dict[int, SAE]) -> None:
    kept = Residency(saes, HOST, RESIDENT_TURNS)
    assert on_device(saes) == {TOPK}
    kept.load(TOPK)
    kept.load(RELU)
    kept.load(SMALL)
    assert TOPK in on_device(saes)


def test_the_others_take_turns_in_one_place(saes: dict[int, SAE]) -> None:
    kept = Residency(saes, HOST, RESIDENT_TURNS)
    places = []
    for index in (RELU, SMALL, RELU):
        kept.load(index)
        assert on_device(saes) == {TOPK, index}
        W_enc, W_dec = matrices(saes[index])
        places.append(W_enc.untyped_storage().data_ptr())
        assert W_dec.untyped_storage().data_ptr() == places[-1]
        assert torch.equal(W_enc, saes[index]._weights._stored("W_enc"))
        assert torch.equal(W_dec, saes[index]._weights._stored("W_dec"))
        assert W_enc.is_contiguous() and W_dec.is_contiguous()
    assert len(set(places)) == 1


def test_an_sae_reads_the_same_wherever_its_weights_are(saes: dict[int, SAE]) -> None:
    x = torch.randn(5, saes[RELU].card.d_in, generator=torch.Generator().manual_seed(0))
    expected = [(f := sae.encode(x), sae.decode(f, x)) for sae in saes.values()]
    kept = Residency(saes, HOST, RESIDENT_TURNS)
    for _ in range(2):
        for (f, x_hat), index in zip(expected, saes, strict=True):
            kept.load(index)
            torch.testing.assert_close(saes[index].encode(x), f)
            torch.testing.assert_close(saes[index].decode(f, x), x_hat)


def test_nothing_is_copied_while_an_sae_keeps_its_turn(
    saes: dict[int, SAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Residency(saes, HOST, RESIDENT_TURNS)
    kept.load(RELU)
    monkeypatch.setattr(SAE, "resident", lambda *_: pytest.fail("copied again"))
    kept.load(RELU)


def test_all_are_kept_where_that_is_chosen(saes: dict[int, SAE]) -> None:
    kept = Residency(saes, HOST, RESIDENT_ALL)
    assert on_device(saes) == set(saes)
    kept.load(RELU)
    assert kept._place is None


@pytest.mark.parametrize("choice", [RESIDENT_NONE, None])
def test_none_is_kept_where_that_is_chosen_or_the_host_is_the_device(
    saes: dict[int, SAE], choice: str | None
) -> None:
    kept = Residency(saes, HOST, choice)
    for index in saes:
        kept.load(index)
    assert not on_device(saes)


def test_a_place_holds_matrices_of_two_dtypes(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_tiny_sae(tmp_path / "a", d_sae=33)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["W_enc"] = tensors["W_enc"][:, :].half()
    save_file(tensors, file)
    sae = open_sae(ResolvedSAE("a", str(folder), path=str(folder)))
    kept = Residency({0: sae}, HOST, RESIDENT_TURNS)
    kept.load(0)
    W_enc, W_dec = matrices(sae)
    assert (W_enc.dtype, W_dec.dtype) == (torch.float16, torch.float32)
    assert torch.equal(W_dec, sae._weights._stored("W_dec"))


def test_a_device_without_room_is_named_in_one_line(
    saes: dict[int, SAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a great deal.")

    monkeypatch.setattr(SAE, "resident", full)
    with pytest.raises(
        SAEError, match=r"no room for .* GiB of SAE '1' .* --steering-resident none"
    ):
        Residency(saes, HOST, RESIDENT_TURNS)
    del saes[TOPK]
    monkeypatch.setattr(residency, "torch", SimpleNamespace(**{**vars(torch), "empty": full}))
    with pytest.raises(SAEError, match=r"no room for .* GiB of the largest SAE"):
        Residency(saes, HOST, RESIDENT_TURNS)


def test_weights_go_to_the_device_in_their_stored_dtype(saes: dict[int, SAE]) -> None:
    meta = torch.device("meta")
    sae = saes[TOPK]
    sae.resident(meta)
    for name, made in zip(("W_enc", "W_dec"), sae._weights._resident[meta].values(), strict=True):
        assert made.device == meta and made.dtype == sae._weights._stored(name).dtype
        assert made.is_contiguous()


def test_choices_are_distinct() -> None:
    assert len(set(RESIDENT_CHOICES)) == 3


@pytest.mark.parametrize("in_part", [4, 100])
def test_saes_of_one_hook_point_change_places_once_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_part: int
) -> None:
    names = "abcdef"
    two = [tied_sae(tmp_path / str(seed), seed=seed) for seed in range(2)]
    elements = batch_parts._ENCODES_AT_ONCE * two[0].card.d_sae * in_part
    monkeypatch.setattr(batch_parts, "_WORKSPACE_ELEMENTS", elements)
    copies = counted_copies(monkeypatch)
    worker = TinyWorker(two, cpu_kernel, resident=RESIDENT_TURNS, slots=len(names))
    for i, name in enumerate(names):  # neighbours read at different SAEs, and each decodes
        worker.state.add_request(name, reads_and_decodes(name, i % 2))
    rng = torch.Generator().manual_seed(0)
    given = {name: [torch.randn(LENGTH, D_MODEL, generator=rng)] for name in names}
    # The batch of the second pass stays that of the third.
    ways = [range(4), range(4, 5), range(5, 6)]
    made: dict[str, list[Tensor]] = {name: [] for name in names}
    for way in ways:
        parts = worker.forward([(name, way.start, way.stop) for name in names], given)
        for name, (stream,) in zip(names, parts, strict=True):
            made[name].append(stream)
    assert len(copies) <= len(ways) + 1
    for i, name in enumerate(names):
        alone = TinyWorker(two, None)
        alone.state.add_request(name, reads_and_decodes(name, i % 2))
        expected = [alone.forward([(name, way.start, way.stop)], given)[0][0] for way in ways]
        for stream, right in zip(made[name], expected, strict=True):
            torch.testing.assert_close(stream, right, rtol=1e-4, atol=1e-4)
        [summary] = worker.state.take_results(name, {0: LENGTH})
        [wanted] = alone.state.take_results(name, {0: LENGTH})
        assert strongest(summary) == strongest(wanted)


def reads_and_decodes(name: str, sae: int) -> SteeringPlan:
    everywhere = COVERS_PROMPT | COVERS_GENERATION
    read = PlannedRead(sae, 3, everywhere, 0, 99, None)
    edit = PlannedEdit(sae, 5, OP_CLAMP, 4.0, everywhere, 0, 99)
    return SteeringPlan(name, 1, 4, (edit,), False, True, read)


def strongest(summary: dict[str, Any]) -> list[tuple[int, list[int]]]:
    read = features_read(summary["read"])
    return [(at, [int(latent) for latent, _ in found]) for at, found in read]


def counted_copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of SAEs as they are put on a device."""
    copies: list[str] = []
    resident = SAE.resident

    def counting(self: SAE, *args: Any) -> None:
        copies.append(self.card.id)
        resident(self, *args)

    monkeypatch.setattr(SAE, "resident", counting)
    return copies
