"""Products through oneDNN against float64."""

from __future__ import annotations

import pytest
import torch

from sae import product as products
from sae.product import product

SHAPES = [(0, 8, 4), (3, 8, 0), (1, 1, 1), (1, 576, 4608), (17, 576, 300), (257, 96, 1000)]


@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_product_is_float32_of_the_exact_one(n: int, k: int, m: int, transposed: bool) -> None:
    # As in files: an SAE's latents are rows, or columns of the stored matrix.
    generator = torch.Generator().manual_seed(n + k + m)
    x = torch.randn(n, k, generator=generator)
    rows = torch.randn(k, m, generator=generator).T if transposed else torch.randn(m, k)
    exact = x.double() @ rows.double().T
    found = product(x, rows)
    assert found.dtype == torch.float32 and found.shape == (n, m)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6 * k)


def test_product_takes_part_of_a_matrix_and_strided_tokens() -> None:
    x, rows = torch.randn(10, 64)[::2], torch.randn(64, 200).T[50:130]
    exact = x.double() @ rows.double().T
    torch.testing.assert_close(product(x, rows).double(), exact, rtol=1e-5, atol=1e-4)


def test_part_of_a_matrix_stored_by_columns_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    # oneDNN would take hundreds of times as long.
    def unwanted(*_: object) -> None:
        raise AssertionError("went through oneDNN")

    monkeypatch.setattr(products, "_linear", unwanted)
    x, rows = torch.randn(5, 64), torch.randn(64, 200).T[50:130]
    assert torch.equal(product(x, rows), x @ rows.T)


def test_product_keeps_what_is_not_finite() -> None:
    x, rows = torch.ones(2, 16), torch.ones(3, 16)
    x[0, 3], rows[1, 5] = torch.inf, torch.nan
    found = product(x, rows)
    assert found[0].tolist()[0] == torch.inf and found.isnan()[:, 1].all()
    assert found[1, [0, 2]].tolist() == [16.0, 16.0]


def test_product_without_onednn_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows = torch.randn(5, 32), torch.randn(7, 32)
    monkeypatch.setattr(products, "_linear", None)
    assert torch.equal(product(x, rows), x @ rows.T)
