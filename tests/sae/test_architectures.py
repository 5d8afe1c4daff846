"""Each architecture on numbers small enough to work by hand.

The SAE of these tests has d_in 2 and three latents:

    W_enc = [[1, 0], [0, 2], [1, 1]]     W_dec = [[1, 0], [0, 1], [3, 4]]     b_dec = [1, -1]

so with b_dec subtracted, x = [3, 1] gives x' = [2, 2] and z' = [2, 4, 4].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.sae import SAE
from tests.sae.suites import sae_lens_config, write_sae_lens

X = torch.tensor([[3.0, 1.0]])


@pytest.fixture
def sae_of(tmp_path: Path, load: Callable[..., SAE]) -> Callable[..., SAE]:
    def build(architecture: str, vectors: dict[str, Tensor], **changes: Any) -> SAE:
        tensors = {
            "W_enc": torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 1.0]]),
            "W_dec": torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]]),
            "b_dec": torch.tensor([1.0, -1.0]),
            **vectors,
        }
        config = sae_lens_config(architecture, d_in=2, d_sae=3, **changes)
        return load(write_sae_lens(tmp_path, config=config, tensors=tensors))

    return build


def assert_same_everywhere(sae: SAE, x: Tensor, f: list[list[float]]) -> None:
    """encode, activations of chosen latents, and the formula over rows all give f."""
    expected = torch.tensor(f)
    assert torch.equal(sae.encode(x), expected)
    assert torch.equal(sae.activations(x, [2, 0]), expected[:, [2, 0]])
    if sae.card.exact_from_row:
        rows = sae.rows([0, 1, 2])
        x_in, _ = sae.normalize(x)
        z = x_in @ rows.W_enc.T
        act = rows.gain * z + rows.bias
        fires = (act > rows.threshold) & (z + rows.gate_bias > 0)
        assert torch.equal(torch.where(fires, act, 0), expected)


def test_standard_is_relu_of_the_shifted_preactivation(sae_of: Callable[..., SAE]) -> None:
    sae = sae_of("standard", {"b_enc": torch.tensor([-5.0, 0.5, 1.0])})
    assert_same_everywhere(sae, X, [[0.0, 4.5, 5.0]])
    # 4.5 * [0, 1] + 5 * [3, 4] + [1, -1]
    assert torch.equal(sae.decode(sae.encode(X), X), torch.tensor([[16.0, 23.5]]))


def test_b_dec_stays_out_of_the_input_where_the_sae_says_so(sae_of: Callable[..., SAE]) -> None:
    sae = sae_of("standard", {"b_enc": torch.zeros(3)}, apply_b_dec_to_input=False)
    assert_same_everywhere(sae, X, [[3.0, 2.0, 4.0]])


def test_latent_at_its_threshold_stays_silent(sae_of: Callable[..., SAE]) -> None:
    vectors = {"b_enc": torch.zeros(3), "threshold": torch.tensor([2.0, 3.75, 4.25])}
    assert_same_everywhere(sae_of("jumprelu", vectors), X, [[0.0, 4.0, 0.0]])


def test_negative_threshold_lets_nothing_negative_through(sae_of: Callable[..., SAE]) -> None:
    vectors = {"b_enc": torch.tensor([-3.0, 0.0, 0.0]), "threshold": torch.full((3,), -10.0)}
    sae = sae_of("jumprelu", vectors)
    assert_same_everywhere(sae, X, [[0.0, 4.0, 4.0]])
    assert torch.equal(sae.rows([0]).threshold, torch.zeros(1))


def test_gate_decides_and_magnitude_measures(sae_of: Callable[..., SAE]) -> None:
    vectors = {
        "b_gate": torch.tensor([-2.0, -3.0, 1.0]),
        "b_mag": torch.tensor([9.0, 1.0, -20.0]),
        "r_mag": torch.tensor([2.0, 0.0, 0.0]),
    }
    # Gates: 2 - 2 = 0 is closed, 4 - 3 open, 4 + 1 open; magnitudes: -, 4 + 1, relu(4 - 20).
    assert_same_everywhere(sae_of("gated", vectors), X, [[0.0, 5.0, 0.0]])


def test_gated_magnitude_grows_with_exp_r_mag(sae_of: Callable[..., SAE]) -> None:
    double = torch.full((3,), 2.0).log()
    vectors = {"b_gate": torch.zeros(3), "b_mag": torch.tensor([0.0, 1.0, 2.0]), "r_mag": double}
    sae = sae_of("gated", vectors)
    torch.testing.assert_close(sae.encode(X), torch.tensor([[4.0, 9.0, 10.0]]))
    torch.testing.assert_close(sae.rows([1]).gain, torch.tensor([2.0]))


def test_topk_keeps_only_the_largest_of_the_token(sae_of: Callable[..., SAE]) -> None:
    sae = sae_of("topk", {"b_enc": torch.tensor([0.0, 0.5, 0.0])}, k=2)
    assert not sae.card.exact_from_row
    assert_same_everywhere(sae, X, [[0.0, 4.5, 4.0]])


def test_topk_never_keeps_a_negative_activation(sae_of: Callable[..., SAE]) -> None:
    sae = sae_of("topk", {"b_enc": torch.tensor([-7.0, 0.0, -6.0])}, k=3)
    assert_same_everywhere(sae, X, [[0.0, 4.0, 0.0]])


def test_abstopk_ranks_by_magnitude_and_keeps_the_sign(sae_of: Callable[..., SAE]) -> None:
    sae = sae_of("abstopk", {"b_enc": torch.tensor([-9.0, 0.0, -9.0])}, k=2)
    # h = [-7, 4, -5]
    assert_same_everywhere(sae, X, [[-7.0, 0.0, -5.0]])


def test_topk_ranks_by_decoder_norm_where_rescaled(sae_of: Callable[..., SAE]) -> None:
    vectors = {"b_enc": torch.tensor([0.0, 4.0, -2.0])}
    sae = sae_of("topk", vectors, k=1, rescale_acts_by_decoder_norm=True)
    # h = [2, 8, 2], decoder norms [1, 1, 5]: the third wins with 10, and writes 2 of its row.
    assert_same_everywhere(sae, X, [[0.0, 0.0, 10.0]])
    torch.testing.assert_close(sae.rows([2]).decoder_scale, torch.tensor([0.2]))
    torch.testing.assert_close(sae.decode(sae.encode(X), X), torch.tensor([[7.0, 7.0]]))


def test_latent_that_writes_nothing_is_silent_under_rescaling(tmp_path: Path, load: Any) -> None:
    tensors = {
        "W_enc": torch.ones(2, 3),
        "W_dec": torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 4.0]]),
        "b_dec": torch.zeros(2),
        "b_enc": torch.ones(3),
    }
    config = sae_lens_config("topk", d_in=2, d_sae=3, k=3, rescale_acts_by_decoder_norm=True)
    sae = load(write_sae_lens(tmp_path, config=config, tensors=tensors))
    assert torch.equal(sae.encode(X)[0, 0], torch.tensor(0.0))
    assert torch.equal(sae.rows([0]).decoder_scale, torch.zeros(1))
    assert sae.decode(sae.encode(X), X).isfinite().all()


def test_layer_norm_scales_input_by_unbiased_sigma(sae_of: Callable[..., SAE]) -> None:
    sae = sae_of(
        "standard",
        {"b_enc": torch.zeros(3)},
        normalize_activations="layer_norm",
        apply_b_dec_to_input=False,
    )
    # x = [3, 1]: mu 2, sigma sqrt(2); x_in = [1, -1] / (sqrt(2) + 1e-5)
    x_in, g = sae.normalize(X)
    torch.testing.assert_close(g, torch.tensor([2.0**0.5]))
    torch.testing.assert_close(x_in, torch.tensor([[1.0, -1.0]]) / (2.0**0.5 + 1e-5))
    # f = [0.7071, 0, 0]; decoded [1.7071, -1], times sigma plus mu.
    out = sae.decode(sae.encode(X), X)
    torch.testing.assert_close(out, torch.tensor([[4.41420, 0.58579]]), atol=2e-5, rtol=0)


def test_constant_norm_rescale_brings_input_to_root_d(sae_of: Callable[..., SAE]) -> None:
    sae = sae_of(
        "standard",
        {"b_enc": torch.zeros(3)},
        normalize_activations="constant_norm_rescale",
        apply_b_dec_to_input=False,
    )
    x = torch.tensor([[6.0, 8.0], [0.0, 0.0]])
    x_in, g = sae.normalize(x)
    # |x| = 10, so x_in = x * sqrt(2) / 10 and g = 10 / sqrt(2); zero stays zero.
    torch.testing.assert_close(g, torch.tensor([10 / 2**0.5, 0.0]))
    torch.testing.assert_close(x_in, torch.tensor([[0.6, 0.8], [0.0, 0.0]]) * 2**0.5)
    assert torch.equal(sae.encode(x)[1], torch.zeros(3))
