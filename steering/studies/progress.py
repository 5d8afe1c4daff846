"""How far a study is: told as it goes to whoever listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: Is told how much is done, and of how much.
Listener = Callable[[int, int], None]


@dataclass
class Progress:
    """Counts the steps of one study.

    A study says how many steps it expects once its body has been validated, and so at the moment
    from which it runs texts. It may expect more as it goes.

    Attributes:
        listener: told at the beginning and after each step; None for nobody.
        done: steps behind it.
        of: steps that are expected in all.
    """

    listener: Listener | None = None
    done: int = 0
    of: int = 0

    def expect(self, steps: int) -> None:
        """Expect so many further steps."""
        self.of += steps
        self._tell()

    def step(self, steps: int = 1) -> None:
        """So many further steps are done."""
        self.done += steps
        self.of = max(self.of, self.done)
        self._tell()

    def _tell(self) -> None:
        if self.listener is not None:
            self.listener(self.done, self.of)
