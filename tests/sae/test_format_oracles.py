"""The suites against the libraries that own them, or against SAELens' loaders for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.sae import SAE
from tests.sae.oracles import assert_same_sae, oracle, sparsify_oracle
from tests.sae.suites import (
    D_IN,
    D_SAE,
    DICTIONARY_CLASSES,
    write_dictionary_learning,
    write_gemma_scope,
    write_goodfire,
    write_llama_scope,
    write_qwen_scope,
    write_sparsify,
)

Load = Callable[..., SAE]


pytestmark = pytest.mark.usefixtures("quiet")


def test_sparsify_agrees_with_its_library(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sparsify(tmp_path)
    theirs = sparsify_oracle(folder, monkeypatch)

    def encode(x: Tensor) -> Tensor:
        out = theirs.encode(x)
        return torch.zeros(len(x), D_SAE).scatter_(1, out.top_indices, out.top_acts)

    def decode(f: Tensor, _: Tensor) -> Tensor:
        values, indices = f.topk(5, dim=1)
        decoded: Tensor = theirs.decode(values, indices)
        return decoded

    assert_same_sae(load(folder), encode, decode)


@pytest.mark.parametrize("dict_class", DICTIONARY_CLASSES)
def test_dictionary_learning_agrees_with_its_library(
    tmp_path: Path, load: Load, dict_class: str
) -> None:
    oracle("dictionary_learning", "dictionary-learning")
    utils = oracle("dictionary_learning.utils", "dictionary-learning")
    folder = write_dictionary_learning(tmp_path, dict_class)
    theirs, _ = utils.load_dictionary(str(folder), device="cpu")
    assert_same_sae(load(folder), theirs.encode, lambda f, _: theirs.decode(f))


def sae_lens_loader(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    repo_id: str,
    folder_name: str,
    local: Path,
    **overrides: Any,
) -> Any:
    """The SAE that SAELens makes of a repository, whose files lie in a folder here."""
    sae_lens = oracle("sae_lens", "sae-lens")
    loaders = oracle("sae_lens.loading.pretrained_sae_loaders", "sae-lens")

    def download(repo_id: str, filename: str, subfolder: str = "", **_: object) -> str:
        return str(local / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    cfg, state, _ = getattr(loaders, name)(
        repo_id=repo_id,
        folder_name=folder_name,
        device="cpu",
        force_download=False,
        cfg_overrides={"dtype": "float32", "d_in": D_IN, "d_sae": D_SAE, **overrides},
    )
    cfg = loaders.handle_config_defaulting(cfg)
    theirs = sae_lens.SAE.from_dict(cfg)
    theirs.load_state_dict(state)
    return theirs


def test_gemma_scope_agrees_with_sae_lens(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_gemma_scope(tmp_path)
    repository = folder.parents[2]
    theirs = sae_lens_loader(
        monkeypatch,
        "gemma_2_sae_huggingface_loader",
        "google/gemma-scope-2b-pt-res",
        str(folder.relative_to(repository)),
        repository,
    )
    assert load(folder).card.hook == theirs.cfg.metadata.hook_name
    assert_same_sae(load(folder), theirs.encode, lambda f, _: theirs.decode(f))


def test_llama_scope_agrees_with_sae_lens(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama_scope(tmp_path)
    theirs = sae_lens_loader(
        monkeypatch, "llama_scope_sae_huggingface_loader", "fnlp/x", folder.name, tmp_path
    )
    # The registry's factor is the same s; SAELens folds it after loading.
    theirs.fold_activation_norm_scaling_factor(D_IN**0.5 / 8.5)
    assert_same_sae(load(folder), theirs.encode, lambda f, _: theirs.decode(f))


def test_goodfire_agrees_with_sae_lens(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_goodfire(tmp_path, name="Llama-3.1-8B-Instruct-SAE-l19.pth")
    theirs = sae_lens_loader(
        monkeypatch,
        "get_goodfire_huggingface_loader",
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        path.name,
        tmp_path,
    )
    assert load(path).card.hook == theirs.cfg.metadata.hook_name
    assert_same_sae(load(path), theirs.encode, lambda f, _: theirs.decode(f))


def test_qwen_scope_agrees_with_sae_lens(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_qwen_scope(tmp_path)
    theirs = sae_lens_loader(
        monkeypatch,
        "qwen_scope_sae_huggingface_loader",
        f"Qwen/{path.parent.name}",
        path.name,
        path.parent,
    )
    mine = load(path)
    assert (mine.card.hook, mine.card.k) == (theirs.cfg.metadata.hook_name, theirs.cfg.k)
    assert_same_sae(mine, theirs.encode, lambda f, _: theirs.decode(f))
