"""Where the tokens of a pass stand, as the scheduler has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class FirstPositions:
    """Says of the pass under way at which position each request's first token stands.

    Attributes:
        scheduler_output: the pass's.
    """

    scheduler_output: Any = None

    def __call__(self) -> Mapping[str, int]:
        scheduled = self.scheduler_output
        cached = scheduled.scheduled_cached_reqs
        found = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        found.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return found
