"""Which tokens of a request are covered."""

from __future__ import annotations

from dataclasses import dataclass, replace

from steering.request.limits import OPEN_END, POSITION_LIMIT


@dataclass(frozen=True)
class Positions:
    """Coverage by phase, by kind of token, and by a window ``[start, end)``.

    A negative ``start`` or ``end`` counts from the prompt's end, as in a Python slice of the
    prompt; `at` turns it into a position from the prompt's start.

    Attributes:
        prompt: whether tokens of the prompt are covered.
        generation: whether tokens after the prompt are covered.
        special_tokens: whether special tokens and the first token are covered too.
        start: the first position of the window.
        end: one past its last position.
    """

    prompt: bool = True
    generation: bool = True
    special_tokens: bool = False
    start: int = 0
    end: int = OPEN_END

    @property
    def int32_end(self) -> int:
        """`end` as devices have it, in int32: no token is at the last position or past it."""
        return min(self.end, POSITION_LIMIT)

    @property
    def empty(self) -> bool:
        """Whether no token could ever be covered, however long the prompt."""
        if not (self.prompt or self.generation) or self.end == 0:
            return True
        if self.end < 0 and not self.prompt:  # the window ends in the prompt
            return True
        return (self.start < 0) == (self.end < 0) and self.start >= self.end

    @property
    def relative(self) -> bool:
        """Whether the window depends on where the prompt ends."""
        return self.start < 0 or self.end < 0

    def at(self, prompt_len: int) -> Positions:
        """The same tokens of a prompt of this length, without negative positions."""
        if not self.relative:
            return self
        start, end = (
            position if position >= 0 else max(position + prompt_len, 0)
            for position in (self.start, self.end)
        )
        return replace(self, start=start, end=end)

    def overlaps(self, other: Positions) -> bool:
        """Whether both cover some phase and their windows overlap.

        Two windows that count from different ends are compared for a prompt that is longer than
        any number in them; `meets` decides for a prompt of a given length.
        """
        same_phase = (self.prompt and other.prompt) or (self.generation and other.generation)
        (start, end), (other_start, other_end) = self._window(), other._window()
        return same_phase and max(start, other_start) < min(end, other_end)

    def meets(self, other: Positions, prompt_len: int) -> bool:
        """Whether both cover some position if the prompt has ``prompt_len`` tokens."""
        (first, past), (other_first, other_past) = (
            positions.span(prompt_len) for positions in (self, other)
        )
        return max(first, other_first) < min(past, other_past)

    def span(self, prompt_len: int, length: int = POSITION_LIMIT) -> tuple[int, int]:
        """The covered positions below ``length``: ``[first, past)``, none if ``first >= past``."""
        window = self.at(prompt_len)
        first = window.start if window.prompt else max(window.start, prompt_len)
        past = min(window.end, length if window.generation else prompt_len)
        return first, past

    def count(self, prompt_len: int, length: int) -> int:
        """How many of ``length`` positions are covered by phase and window.

        The first ``prompt_len`` of them are the prompt's. Special tokens count like all others.
        """
        first, past = self.span(prompt_len, length)
        return max(past - first, 0)

    def _window(self) -> tuple[int, int]:
        prompt_len = 2**33
        past = 2 * prompt_len if self.end == OPEN_END else self.end
        start, end = (p + prompt_len if p < 0 else p for p in (self.start, past))
        return start, end

    def why_empty(self) -> str:
        """Why `empty` holds, for a refusal."""
        if not (self.prompt or self.generation):
            return "neither prompt nor generation is covered"
        if self.end < 0 and not self.prompt:
            return f"end {self.end} lies in the prompt, which is not covered"
        return f"the window [{self.start}, {self.end}) is empty"
