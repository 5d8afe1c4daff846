from __future__ import annotations

import subprocess
import sys

import pytest

from sae.card import HOOK_KINDS, HookPoint
from sae.errors import SAEError
from sae.sae import check_fits
from tests.sae.cards import CARD


@pytest.mark.parametrize("kind", HOOK_KINDS)
def test_hook_point_reads_back_as_it_is_written(kind: str) -> None:
    hook = HookPoint.parse(f"blocks.14.{kind}")
    assert (hook.layer, hook.kind) == (14, kind)
    assert str(hook) == f"blocks.14.{kind}"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blocks.14",
        "blocks.-1.hook_resid_post",
        "blocks.x.hook_resid_post",
        "blocks.14.hook_resid_post ",
        "model.layers.14",
        "blocks.٣.hook_resid_post",
        "blocks.99999999999999999999.hook_resid_post",
    ],
)
def test_unknown_hook_point_is_refused_by_name(name: str) -> None:
    with pytest.raises(SAEError, match=r"unknown hook point .*hook_resid_post") as caught:
        HookPoint.parse(name)
    assert repr(name) in str(caught.value)


def test_card_shows_the_fields_of_the_contract_in_its_order() -> None:
    assert list(CARD.to_json().items()) == [
        ("id", "l15"),
        ("object", "sae"),
        ("kind", "sae"),
        ("hook", "blocks.15.hook_resid_post"),
        ("reads", "blocks.15.hook_resid_post"),
        ("writes", ["blocks.15.hook_resid_post"]),
        ("layer", 15),
        ("architecture", "jumprelu"),
        ("d_in", 576),
        ("d_sae", 4608),
        ("dtype", "float32"),
        ("source", "hf://owner/repo"),
        ("format", "sae_lens"),
        ("sha256", None),
        ("sink_norm", None),
        ("error_term", True),
        ("has_labels", True),
        ("has_max_activations", True),
    ]


def test_model_of_another_width_is_refused_with_both_numbers() -> None:
    check_fits(CARD, d_model=576, num_layers=16)
    with pytest.raises(SAEError, match=r"d_in is 576, the model's hidden size is 2048"):
        check_fits(CARD, d_model=2048, num_layers=16)


def test_layer_past_the_model_is_refused_with_its_range() -> None:
    with pytest.raises(SAEError, match=r"layer 15 does not exist, the model has layers 0 to 14"):
        check_fits(CARD, d_model=576, num_layers=15)


def test_an_error_is_one_line() -> None:
    assert str(SAEError("two\nlines  and\tspaces")) == "two lines and spaces"


def test_cards_and_sources_need_neither_torch_nor_numpy() -> None:
    program = (
        "import sys, sae.card, sae.source, sae.errors\n"
        "assert not {'torch', 'numpy', 'vllm'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
