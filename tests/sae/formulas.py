"""The formulas of the architectures, and what it means that an opened dictionary follows one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sae.sae import SAE
from tests.sae.oracles import assert_same_sae
from tests.sae.other_suites import skip
from tests.sae.suites import D_IN, inputs, weights

#: Where most of the transcoders in the tests read and write.
READS, WRITES = "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"


def relu(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    return (x @ w["W_enc"].T + w["b_enc"]).relu()


def jumprelu(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    h = x @ w["W_enc"].T + w["b_enc"]
    return h * (h > w["threshold"])


def topk(h: Tensor, k: int) -> Tensor:
    kept = h >= h.topk(k, dim=-1).values[:, -1:]
    return h.relu() * kept


def assert_formula(
    sae: SAE,
    f_of: Callable[[Tensor, dict[str, Tensor]], Tensor],
    scale: float = 1.0,
) -> None:
    """f_of(x, canonical weights) and f @ W_dec/s + b_dec/s, both in float64."""
    w = {name: tensor.double() for name, tensor in weights().items()}
    assert_same_sae(
        sae,
        lambda x: f_of(x.double(), w).float(),
        lambda f, _: ((f.double() @ w["W_dec"] + w["b_dec"]) / scale).float(),
    )


def assert_transcoder(
    sae: SAE,
    f_of: Callable[[Tensor, dict[str, Tensor]], Tensor],
    *,
    reads: str = READS,
    with_skip: bool = False,
    seed: int = 0,
) -> None:
    """Its places, its activations, its output, and the rows that an edit takes."""
    card = sae.card
    assert (card.kind, card.reads, card.writes) == ("transcoder", reads, (WRITES,))
    assert (card.hook, card.layer, card.d_in, card.d_out) == (WRITES, 3, D_IN, D_IN)
    assert card.error_term
    w, x = weights(seed), inputs()
    f = f_of(x, w)
    y = f @ w["W_dec"] + w["b_dec"] + (x @ skip().T if with_skip else 0)
    assert_same_sae(sae, lambda x: f_of(x, w), lambda f, x: (
        f @ w["W_dec"] + w["b_dec"] + (x @ skip().T if with_skip else 0)
    ))  # fmt: skip
    torch.testing.assert_close(sae.decode(f, x), y, atol=1e-4, rtol=1e-5)
    rows = sae.rows([7, 0])
    torch.testing.assert_close(rows.W_dec * rows.decoder_scale[:, None], w["W_dec"][[7, 0]])
