"""What the run of a text leaves behind for another run of it to be compared with.

A study runs a text unsteered, keeps what it needs of that run under a key of its own choice, runs
it steered as often as it likes, and releases the key at its end. One worker of a tensor-parallel
group keeps what concerns the stream; each pipeline stage keeps that of its own layers.
"""

from __future__ import annotations

from typing import Protocol


class Kept(Protocol):
    """Something that is kept."""

    @property
    def nbytes(self) -> int:
        """Memory held, on the host or on the device."""
        ...


class Captures:
    """What is kept, by key and name."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Kept]] = {}

    def keep(self, key: str, name: str, kept: Kept) -> None:
        """Keep something until its key is released; it replaces what had that name.

        Args:
            key: of the study's text.
            name: what it is, among all that is kept under the key.
            kept: the thing.
        """
        self._kept.setdefault(key, {})[name] = kept

    def get(self, key: str, name: str) -> Kept | None:
        """What was kept; None if nothing is, or if it was released."""
        return self._kept.get(key, {}).get(name)

    def release(self, key: str) -> None:
        """Forget all that is kept under a key; nothing may be."""
        self._kept.pop(key, None)

    @property
    def nbytes(self) -> int:
        """Memory held in all."""
        return sum(kept.nbytes for names in self._kept.values() for kept in names.values())

    def __len__(self) -> int:
        return len(self._kept)
