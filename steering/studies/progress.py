"""A study's progress, told as it goes to whoever listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: Takes how many steps are done, and of how many.
Listener = Callable[[int, int], None]


@dataclass
class Progress:
    """Counts the steps of one study.

    A study first says how many steps it expects when its body has been validated and it begins to
    run texts. It may expect more as it goes.

    Attributes:
        listener: called whenever steps are expected or done; None for nobody.
        done: how many steps are done.
        of: how many steps are expected in all.
    """

    listener: Listener | None = None
    done: int = 0
    of: int = 0

    def expect(self, steps: int) -> None:
        """Expect further steps."""
        self.of += steps
        self._tell()

    def step(self, steps: int = 1) -> None:
        """Count further steps as done."""
        self.done += steps
        self.of = max(self.of, self.done)
        self._tell()

    def _tell(self) -> None:
        if self.listener is not None:
            self.listener(self.done, self.of)
