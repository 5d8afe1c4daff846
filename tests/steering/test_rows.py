"""The row pool: shared, counted, evicted oldest first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae.errors import SAEError
from sae.sae import SAE, open_sae
from sae.source import SAEReference
from steering.request.plan import RowKey
from steering.worker.rows import RowPool
from tests.models import make_tiny_sae


@pytest.fixture
def tiny_sae(tmp_path: Path) -> SAE:
    path = make_tiny_sae(tmp_path / "sae")
    return open_sae(SAEReference("a", str(path), path=str(path)))


@pytest.fixture
def pool(tiny_sae: SAE) -> Callable[[int], RowPool]:
    return lambda capacity: RowPool([tiny_sae], capacity, 64, "cpu")


def test_acquired_rows_are_the_saes_own(pool: Callable[[int], RowPool], tiny_sae: SAE) -> None:
    made = pool(4)
    where = made.acquire([RowKey(0, 5), RowKey(0, 77)])
    rows = tiny_sae.rows([5, 77])
    for i, latent in enumerate((5, 77)):
        assert torch.equal(made.W_enc[where[RowKey(0, latent)]], rows.W_enc[i])
        assert torch.equal(made.W_dec[where[RowKey(0, latent)]], rows.W_dec[i])


def test_rows_of_a_file_that_shrank_are_refused_not_read(
    pool: Callable[[int], RowPool], tiny_sae: SAE, tmp_path: Path
) -> None:
    made = pool(4)
    made.acquire([RowKey(0, 5)])
    os.truncate(tmp_path / "sae" / "sae_weights.safetensors", 4096)
    with pytest.raises(SAEError, match="changed on disk"):
        made.acquire([RowKey(0, 6)])


def test_requests_share_rows_and_the_last_one_releases_them(
    pool: Callable[[int], RowPool],
) -> None:
    made = pool(4)
    first = made.acquire([RowKey(0, 1), RowKey(0, 2)])
    second = made.acquire([RowKey(0, 2), RowKey(0, 3)])
    assert first[RowKey(0, 2)] == second[RowKey(0, 2)]
    assert made.rows_in_use == 3
    made.release([RowKey(0, 1), RowKey(0, 2)])
    assert made.rows_in_use == 2
    made.release([RowKey(0, 2), RowKey(0, 3)])
    assert made.rows_in_use == 0


def test_idle_rows_stay_until_the_room_is_needed_and_go_oldest_first(
    pool: Callable[[int], RowPool], tiny_sae: SAE
) -> None:
    made = pool(3)
    kept = made.acquire([RowKey(0, 1)])
    for latent in (2, 3):
        made.acquire([RowKey(0, latent)])
        made.release([RowKey(0, latent)])
    made.acquire([RowKey(0, 4)])  # evicts 2, the oldest idle row
    again = made.acquire([RowKey(0, 1)])
    assert again == kept
    made.release([RowKey(0, 4)])
    where = made.acquire([RowKey(0, 3)])  # was still resident
    assert torch.equal(made.W_enc[where[RowKey(0, 3)]], tiny_sae.rows([3]).W_enc[0])
    assert made.rows_in_use == 2


def test_running_out_of_rows_is_our_bug(pool: Callable[[int], RowPool]) -> None:
    made = pool(1)
    made.acquire([RowKey(0, 1)])
    with pytest.raises(AssertionError, match="capacity 1"):
        made.acquire([RowKey(0, 2)])
