"""The libraries that own the formats, and what it means to agree with one."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.sae import SAE
from tests.sae.suites import inputs


def oracle(module: str, package: str) -> ModuleType:
    """The module; the test is skipped where its package is not installed."""
    with warnings.catch_warnings():
        # Their dependencies warn about one another at import.
        warnings.simplefilter("ignore")
        imported: ModuleType = pytest.importorskip(
            module, reason=f"the oracle of this test is the package {package}", exc_type=ImportError
        )
    _undo_nnsight()
    return imported


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The libraries warn, print and keep gradients."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        yield


def sparsify_oracle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The SparseCoder of sparsify's own that lies in a folder."""
    module = oracle("sparsify.sparse_coder", "eai-sparsify")
    # Its decoder in PyTorch; the other needs a GPU.
    eager = oracle("sparsify.utils", "eai-sparsify").eager_decode
    monkeypatch.setattr(module, "decoder_impl", eager)
    return module.SparseCoder.load_from_disk(folder)


def _undo_nnsight() -> None:
    """Take back what nnsight, which dictionary-learning imports, replaces in torch at import.

    torch's FakeTensor is among it, and without its own constructor nothing compiles any more in
    this process.
    """
    nnsight = sys.modules.get("nnsight")
    if nnsight is not None:
        for patch in nnsight.DEFAULT_PATCHER.patches:
            patch.restore()


def assert_same_sae(
    mine: SAE, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """encode, chosen activations, decode and reconstruction agree in float32 to 1e-5.

    Args:
        encode: the other's x [n, d_in] -> f [n, d_sae].
        decode: the other's (f, the x it came from) -> x_hat [n, d_in].
    """
    x = inputs(d_in=mine.card.d_in)
    f = encode(x)
    # Otherwise nothing was compared.
    assert (f != 0).any()
    assert (f == 0).any()
    torch.testing.assert_close(mine.encode(x), f, atol=1e-5, rtol=1e-5)
    latents = [0, mine.card.d_sae - 1, 7]
    torch.testing.assert_close(mine.activations(x, latents), f[:, latents], atol=1e-5, rtol=1e-5)
    # Sums of tens of terms: 1e-5 of the largest.
    scale = float(decode(f, x).abs().max())
    torch.testing.assert_close(mine.decode(f, x), decode(f, x), atol=1e-5 * scale, rtol=0)
    x_hat = mine.decode(mine.encode(x), x)
    torch.testing.assert_close(x_hat, decode(f, x), atol=1e-5 * scale, rtol=0)
