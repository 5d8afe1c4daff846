"""The pieces of the recipe, on numbers that were worked by hand, and all of it in miniature."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sae.card import HookPoint
from sae.features import FeatureTable
from sae.sae import SAE, open_sae
from sae.source import SAEReference
from sae.training import activations, chat, corpus, evaluate, labels
from sae.training.activations import Window
from sae.training.labels import Label
from sae.training.model_hooks import caught
from sae.training.texts import Document
from sae.training.train import Recipe, export, shuffled, train
from tests.models import D_MODEL, make_tiny_model, make_tokenizer
from tests.sae.documents import LONG, document

STREAM = HookPoint(1, "hook_resid_post")


def write_sae(folder: Path, W_enc: torch.Tensor, W_dec: torch.Tensor) -> Path:
    """A ReLU SAE without biases: ``W_enc`` `[d_in, d_sae]`, ``W_dec`` `[d_sae, d_in]`."""
    folder.mkdir(parents=True)
    d_in, d_sae = W_enc.shape
    config = {
        "architecture": "standard",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    tensors = {
        "W_enc": W_enc.contiguous(),
        "W_dec": W_dec.contiguous(),
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(d_in),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def opened(folder: Path) -> SAE:
    return open_sae(SAEReference("sae", str(folder)))


# Activations


def test_only_ordinary_tokens_of_a_window_are_recorded() -> None:
    batch = [
        Window([5, 6, 2, 7, 8], first=0, document=document("a")),
        Window([5, 6, 7], first=2, document=document("b")),
    ]
    ids = torch.tensor([[5, 6, 2, 7, 8], [5, 6, 7, 0, 0]])
    stream = torch.ones(2, 5, 4)
    stream[0, 4] = activations.SINK_NORM  # a norm of twice that
    kept = activations.recorded(batch, ids, stream, special=[0, 2])
    assert kept.tolist() == [
        [False, True, False, True, False],  # the first, a special token and a sink are left out
        [False, False, True, False, False],  # context and padding are left out
    ]


def test_windows_cover_every_token_once_and_context_is_marked() -> None:
    tokenizer = make_tokenizer()
    text = "the quick brown fox jumps over the lazy dog " * 60
    context = "She said that she would return."
    whole = Document("chat", "a", text, context)
    cuts = activations.windows(tokenizer, [whole])
    ids = [*tokenizer(context, add_special_tokens=False)["input_ids"]]
    length = len(ids)
    ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [token for cut in cuts for token in cut.ids] == ids
    assert [cut.first for cut in cuts] == [length, *[0] * (len(cuts) - 1)]
    assert all(len(cut.ids) == activations.WINDOW for cut in cuts[:-1])


def test_batches_hold_at_most_their_tokens_and_pad_on_the_right() -> None:
    cuts = [Window([1] * n, 0, document("a")) for n in (200, 200, 150, 3)]
    found = list(activations.batches(cuts, pad=9))
    assert [window for batch, _ in found for window in batch] == cuts
    [(_, ids)] = found
    assert ids.shape == (4, 200)
    assert (ids != 9).sum(dim=1).tolist() == [200, 200, 150, 3]
    assert ids[3, :3].tolist() == [1, 1, 1]


# Training


def test_batches_of_a_pass_hold_every_row_once_and_passes_differ() -> None:
    rows = torch.arange(12.0)[:, None].bfloat16()
    stream = shuffled(rows, batch=4, seed=0)
    passes = [torch.cat([next(stream) for _ in range(3)])[:, 0].tolist() for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(12))
    assert passes[0] != passes[1]
    with pytest.raises(ValueError, match="12 rows do not fill a batch of 13"):
        next(shuffled(rows, batch=13, seed=0))


# Figures


def test_variance_l0_and_silent_features_are_as_worked_by_hand(tmp_path: Path) -> None:
    W_enc = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 1.0]])
    sae = opened(write_sae(tmp_path / "sae", W_enc, W_dec))
    # Decoded to [2, 0] and [0, 2]: 4 of the variance about [1, 2], which is 5 + 5, is missing.
    found = evaluate.reconstruction(sae, torch.tensor([[2.0, 0.0], [0.0, 4.0]]).bfloat16())
    assert (found.tokens, found.l0) == (2, 1.0)
    assert found.fvu == pytest.approx(0.4)
    assert found.silent == pytest.approx(1 / 3)


def test_statistics_find_the_strongest_rows_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "CHUNK", 2)
    sae = opened(write_sae(tmp_path / "sae", torch.eye(2), torch.eye(2)))
    rows = torch.tensor([[1.0, 0], [3, 0], [2, 0], [0, -1], [5, 0]])
    found = evaluate.statistics(sae, rows, count=2)
    assert found.max_activation.tolist() == [5, 0]
    assert found.density.tolist() == pytest.approx([0.8, 0])
    assert found.strongest_rows[:, 0].tolist() == [4, 1]
    assert found.strongest[:, 0].tolist() == [5, 3]


def test_loss_recovered_is_the_share_of_what_an_ablation_costs() -> None:
    losses = evaluate.Losses(clean=2.0, reconstructed=2.5, zero=7.0, mean=6.0)
    assert losses.recovered(losses.zero) == pytest.approx(0.9)
    assert losses.recovered(losses.mean) == pytest.approx(0.875)


def test_windows_are_taken_at_even_distances() -> None:
    cuts = [Window([n], 0, document("a")) for n in range(10)]
    assert [cut.ids[0] for cut in evaluate.spaced(cuts, 4)] == [0, 3, 6, 9]
    assert evaluate.spaced(cuts, 20) == cuts


# Labels


def test_a_label_counts_its_matches_whatever_their_case() -> None:
    label = Label(3, "French text", r"\b(le|la)\b", in_context=2)
    assert label.matches("Le chat et la table; bleu.") == 2
    assert labels.specificity(label, ["le la", "le", "none", "La LE la"]) == 0.5


def test_the_strongest_contexts_are_one_a_window_and_none_too_weak() -> None:
    f = torch.tensor([1.0, 5.0, 4.0, 3.0, 0.5])
    window = torch.tensor([0, 1, 1, 0, 2])
    assert labels.strongest(f, window, least=1.0, count=9) == [1, 3]
    assert labels.strongest(f, window, least=0.1, count=2) == [1, 3]
    assert labels.strongest(f, window, least=0.1, count=9) == [1, 3, 4]


def test_labels_are_written_beside_statistics_and_old_ones_go(tmp_path: Path) -> None:
    path = tmp_path / "features.jsonl"
    path.write_text(
        '{"index": 0, "label": "old", "max_activation": 2.0, "specificity": 1.0}\n'
        '{"index": 1, "max_activation": 3.0, "density": 0.1}\n'
    )
    labels.write_labels(path, [Label(1, "colours", "red")], [{"specificity": 0.7, "contexts": 20}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"index": 0, "max_activation": 2.0},
        {"index": 1, "max_activation": 3.0, "density": 0.1, "label": "colours",
         "specificity": 0.7, "contexts": 20},
    ]  # fmt: skip
    assert FeatureTable.open(tmp_path, 2).label(1) == "colours"
    with pytest.raises(ValueError, match=r"no feature \[7\]"):
        labels.write_labels(path, [Label(7, "none", "x")], [{}])


def test_a_feature_has_one_label(tmp_path: Path) -> None:
    line = '{"index": 1, "label": "a", "test": "a"}\n'
    (tmp_path / "labels.jsonl").write_text(line + line)
    with pytest.raises(ValueError, match="two labels"):
        labels.read_labels(tmp_path / "labels.jsonl")


# All of it


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def work(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with the activations of a few documents at layer 1."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("work")
    words = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nine")
    for name, seed in (("corpus", 1), ("held_out", 2)):
        chance = torch.Generator().manual_seed(seed)
        order = torch.randint(len(words), (12, 120), generator=chance)
        every = [document(" ".join(words[i] for i in row)) for row in order.tolist()]
        corpus.write(folder / f"{name}.jsonl", every)
    model: Any = AutoModel.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for name in ("corpus", "held_out"):
        activations.write(model, tokenizer, [STREAM], folder, name)
    return folder


def test_conversations_that_were_interrupted_are_not_taken_for_all_of_them(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken = {"kind": "chat", "source": "the model", "context": "", "text": LONG}

    def interrupted(*arguments: object) -> Iterator[dict[str, str]]:
        yield spoken
        raise KeyboardInterrupt

    target = tmp_path / "chat.jsonl"
    monkeypatch.setattr(chat, "converse", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.write_chat(model_folder, target, 2, seed=0)
    assert not target.exists()
    monkeypatch.setattr(chat, "converse", lambda *arguments: iter([spoken, spoken]))
    chat.write_chat(model_folder, target, 2, seed=0)
    assert [d.text for d in corpus.read(target)] == [LONG, LONG]


def test_rows_stand_beside_the_places_that_they_are_from(model_folder: Path, work: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = activations.stored(work, "held_out", STREAM)
    place = activations.places(work, "held_out", STREAM)
    cuts = activations.windows(tokenizer, corpus.read(work / "held_out.jsonl"))
    assert len(rows) == len(place) == sum(len(cut.ids) - 1 for cut in cuts)
    window, position = place[-1].tolist()
    (alone,) = caught(
        model.layers, [STREAM], lambda: model(input_ids=torch.tensor([cuts[window].ids]))
    )
    assert torch.allclose(rows[-1].float(), alone[0, position], rtol=0.02, atol=0.02)


def test_a_perfect_sae_loses_nothing_and_an_ablation_does(
    model_folder: Path, work: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    sae = opened(write_sae(tmp_path / "sae", both.T, both))
    cuts = activations.windows(tokenizer, corpus.read(work / "held_out.jsonl"))
    mean = activations.stored(work, "held_out", STREAM).float().mean(dim=0)
    found = evaluate.losses(model, tokenizer, cuts, sae, mean)
    assert found.reconstructed == pytest.approx(found.clean, abs=1e-4)
    assert found.zero != pytest.approx(found.clean, abs=1e-2)
    assert found.mean != pytest.approx(found.clean, abs=1e-2)


def test_no_latent_carries_a_mean_that_all_rows_share(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(16, D_MODEL, generator=generator))
    shown = torch.rand(6000, 16, generator=generator) < 0.15
    rows = (shown * (1 + torch.rand(6000, 16, generator=generator))) @ directions
    rows = (rows + 10 * torch.randn(D_MODEL, generator=generator)).bfloat16()
    recipe = Recipe(d_sae=64, k=4, tokens=128 * 150, batch=128, learning_rate=3e-3, dead_after=20)
    export(
        train(rows, recipe),
        tmp_path / "sae",
        {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_post"},
    )
    sae = opened(tmp_path / "sae")
    assert (sae.encode(rows.float()) > 0).float().mean(dim=0).max() < 0.5
    assert evaluate.reconstruction(sae, rows).fvu < 0.5


def test_a_trained_sae_is_exported_loads_here_and_encodes_as_sae_lens_does(
    work: Path, tmp_path: Path
) -> None:
    from sae_lens import SAE as LensSAE

    rows = activations.stored(work, "corpus", STREAM)
    recipe = Recipe(d_sae=128, k=8, tokens=128 * 150, batch=128, learning_rate=3e-3, dead_after=20)
    trained = train(rows, recipe)
    hook = {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_post", "sink_norm": 2000.0}
    export(trained, tmp_path / "sae", hook)
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]
    sae = opened(tmp_path / "sae")
    assert (sae.card.architecture, sae.card.layer, sae.card.sink_norm) == ("jumprelu", 1, 2000.0)
    held_out = activations.stored(work, "held_out", STREAM)
    figures = evaluate.reconstruction(sae, held_out)
    assert figures.fvu < 0.6
    assert 2 < figures.l0 < 24

    lens = LensSAE.load_from_disk(str(tmp_path / "sae"), device="cpu", dtype="float32")
    x = held_out[:200].float()
    with torch.no_grad():
        assert torch.allclose(sae.encode(x), lens.encode(x), rtol=1e-4, atol=1e-4)
        assert torch.allclose(
            sae.decode(sae.encode(x), x), lens.decode(lens.encode(x)), rtol=1e-4, atol=1e-4
        )

    evaluate.state(tmp_path / "sae" / "cfg.json", figures)
    stated = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert (stated["fvu"], stated["l0"]) == pytest.approx((figures.fvu, figures.l0), abs=0.05)
    assert stated["hook_name"] == "blocks.1.hook_resid_post"

    found = evaluate.statistics(sae, rows)
    evaluate.write_statistics(tmp_path / "sae" / "features.jsonl", found)
    table = FeatureTable.open(tmp_path / "sae", 128)
    strongest = int(found.max_activation.argmax())
    assert table.max_activation(strongest) == pytest.approx(
        float(found.max_activation[strongest]), abs=0.05
    )
