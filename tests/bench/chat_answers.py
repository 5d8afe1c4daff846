"""Greedy answers of a served model to chat prompts, with and without steering."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from server.commands.demo_model import ensure_demo_model
from tests.engine.server import MAX_NUM_SEQS, LiveServer, serving

#: As the demo's: plain greedy text of this model degenerates.
REPETITION_PENALTY: Final = 1.15
#: Seconds; a study takes minutes on a busy machine.
STUDY_TIMEOUT: Final = 1800.0


@contextmanager
def served(*sources: str) -> Iterator[LiveServer]:
    """The demo model on a server of its own, in float32, with each source as a `--sae`."""
    flags = [word for source in sources for word in ("--sae", source)]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(ensure_demo_model(), {}, Path(folder) / "server.log", *flags) as server,
    ):
        server.client.timeout = STUDY_TIMEOUT
        yield server


def answers(
    server: LiveServer, prompts: Sequence[str], steering: Mapping[str, Any] | None, max_tokens: int
) -> list[str]:
    """What each prompt is answered."""

    def answer(prompt: str) -> str:
        response = server.chat(
            prompt, steering, max_tokens=max_tokens, repetition_penalty=REPETITION_PENALTY
        )
        response.raise_for_status()
        text: str = response.json()["choices"][0]["message"]["content"]
        return text

    with ThreadPoolExecutor(MAX_NUM_SEQS) as threads:
        return list(threads.map(answer, prompts))


def study(server: LiveServer, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """What a study's route answers."""
    response = server.client.post(path, json=body)
    response.raise_for_status()
    found: dict[str, Any] = response.json()
    return found


def repeated(text: str) -> float:
    """Share of word trigrams that occurred before."""
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
