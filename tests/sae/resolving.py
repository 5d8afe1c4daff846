"""Resolves sources where the hub's client reads its environment for the first time.

It reads it when it is imported, hence a process for each answer: forked from one that has imported
everything else, which takes a fifth of the time of a new interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import Pool
from typing import Any, Final

from sae.errors import SAEError
from sae.layers import resolve_all
from sae.source import SAEReference

#: Seconds that one answer may take.
TIMEOUT: Final = 120.0


@dataclass(frozen=True)
class Resolving:
    """Processes of one task each."""

    pool: Pool

    def answers(
        self, sources: Sequence[str], environment: Mapping[str, str], path: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """The references that the sources stand for, or what each was refused with.

        Args:
            environment: all of the process's.
            path: where modules are looked for first.
        """
        asked = (list(sources), dict(environment), list(path))
        return self.pool.apply_async(_answers, asked).get(TIMEOUT)


@contextmanager
def resolving() -> Iterator[Resolving]:
    """Until the end of the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1, maxtasksperchild=1) as pool:
        yield Resolving(pool)


def _answers(
    sources: list[str], environment: dict[str, str], path: list[str]
) -> list[dict[str, Any]]:
    assert "huggingface_hub" not in sys.modules
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = path
    found: list[dict[str, Any]] = []
    for source in sources:
        try:
            found += [ref.to_dict() for ref in resolve_all(SAEReference.parse(f"l3={source}"))]
        except SAEError as error:
            found.append({"refused": str(error)})
    return found
