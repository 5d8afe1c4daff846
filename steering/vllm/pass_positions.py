"""The positions of a pass's tokens, as the scheduler states them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class FirstPositions:
    """Tells the position of each request's first token in the pass under way.

    Attributes:
        scheduler_output: the scheduler's output for that pass; set before it begins.
    """

    scheduler_output: Any = None

    def __call__(self) -> Mapping[str, int]:
        """By request id, for all requests of the pass."""
        scheduled = self.scheduler_output
        cached = scheduled.scheduled_cached_reqs
        found = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        found.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return found
