"""The corpus: documents of all packages, without repetitions, in given shares, some held out.

    python -m sae.training.corpus --model FOLDER --work FOLDER [--tokens N] [--chats N]

writes ``corpus.jsonl`` and ``held_out.jsonl`` to the work folder: one document a line, ``kind``,
``source``, ``context`` and ``text``, in random order.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import random
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from sae.training.chat import write_chat
from sae.training.packages import PACKAGES, fetch
from sae.training.texts import Document, Kind, documents

logger = logging.getLogger(__name__)

#: Shares of all tokens. Chat is the model's own, nearly all of it English.
SHARES: Final[dict[Kind, float]] = {
    "english": 0.53,
    "chat": 0.07,
    "code": 0.15,
    "maths": 0.05,
    "languages": 0.20,
}
#: One document in this many is kept out of training, for the figures and the labels.
HELD_OUT_EVERY: Final = 10
#: A paragraph shorter than this may repeat: a date, a name, "Yes."
SHORTEST_UNIQUE: Final = 40
#: A document goes whole if less than this share of it is left without its repeated paragraphs.
LEAST_LEFT: Final = 0.5
#: In characters. Longer documents are cut, so that one long speech does not fill its source's turn.
LONGEST: Final = 3000
SHORTEST: Final = 80


def deduplicated(texts: Iterable[Document]) -> Iterator[Document]:
    """Drop paragraphs that were seen before, and documents of which too little is left.

    Paragraphs are compared in lower case, digits all alike, white space as one blank: so
    "Page 3 of 10" repeats "page 4 of 10".
    """
    seen: set[bytes] = set()
    for document in texts:
        kept = []
        for paragraph in re.split(r"\n\s*\n", document.text):
            normal = re.sub(r"\s+", " ", re.sub(r"\d", "0", paragraph)).strip().lower()
            if len(normal) >= SHORTEST_UNIQUE:
                digest = hashlib.blake2b(normal.encode(), digest_size=8).digest()
                if digest in seen:
                    continue
                seen.add(digest)
            kept.append(paragraph)
        text = "\n\n".join(kept).strip("\n")
        if len(text) >= max(SHORTEST, LEAST_LEFT * len(document.text)):
            yield dataclasses.replace(document, text=text)


def is_held_out(document: Document) -> bool:
    """Whether a document is for evaluation. Its text alone decides, so that any mix agrees."""
    digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_EVERY == 0


def cut(document: Document) -> Iterator[Document]:
    """A document in pieces of at most `LONGEST` characters, cut at line ends if it has any."""
    text = document.text
    while len(text) > LONGEST:
        end = text.rfind("\n", LONGEST // 2, LONGEST) + 1 or LONGEST
        yield dataclasses.replace(document, text=text[:end])
        text = text[end:]
    if len(text) >= SHORTEST:
        yield dataclasses.replace(document, text=text)


def mixed(
    texts: Iterable[Document],
    tokens: int,
    length: Callable[[str], int],
    seed: int,
    shares: dict[Kind, float] = SHARES,
) -> list[Document]:
    """Draw documents until each kind has its share of `tokens`; the sources of a kind in turn.

    Args:
        texts: what there is.
        tokens: the budget.
        length: tokens of a text.
        seed: for the order within a source and the order of the result.
        shares: of each kind, adding up to 1. A kind with too little text gives all it has.
    """
    chance = random.Random(seed)
    pools: dict[Kind, dict[str, list[Document]]] = {kind: {} for kind in shares}
    for document in texts:
        pools[document.kind].setdefault(document.source, []).append(document)
    drawn: list[Document] = []
    for kind, sources in pools.items():
        left = shares[kind] * tokens
        for pool in sources.values():
            chance.shuffle(pool)
        turns = deque(sources.values())
        while turns and left > 0:
            pool = turns.popleft()
            document = pool.pop()
            drawn.append(document)
            left -= length(document.text)
            if pool:
                turns.append(pool)
        if left > 0:
            logger.warning("%s: %d of %d tokens missing", kind, left, shares[kind] * tokens)
    chance.shuffle(drawn)
    return drawn


def write(path: Path, texts: Iterable[Document]) -> None:
    """Write one document a line."""
    with path.open("w", encoding="utf-8") as file:
        for document in texts:
            file.write(json.dumps(dataclasses.asdict(document), ensure_ascii=False) + "\n")


def read(path: Path) -> list[Document]:
    """What `write`, or `sae.training.chat`, wrote."""
    with path.open(encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=900_000)
    parser.add_argument("--held-out-tokens", type=int, default=240_000)
    parser.add_argument("--chats", type=int, default=640)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    packages = arguments.work / "packages"
    logger.info("%d of %d packages", len(fetch(PACKAGES, packages)), len(PACKAGES))
    chat = arguments.work / "chat.jsonl"
    if not chat.exists():
        write_chat(arguments.model, chat, arguments.chats, arguments.seed)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    training: list[Document] = []
    held_out: list[Document] = []
    for document in deduplicated([*documents(packages), *read(chat)]):
        (held_out if is_held_out(document) else training).extend(cut(document))
    for name, texts, tokens in (
        ("corpus", training, arguments.tokens),
        ("held_out", held_out, arguments.held_out_tokens),
    ):
        drawn = mixed(texts, tokens, length, arguments.seed)
        write(arguments.work / f"{name}.jsonl", drawn)
        logger.info("%s: %d documents, %s", name, len(drawn), Counter(d.kind for d in drawn))


if __name__ == "__main__":
    main()
