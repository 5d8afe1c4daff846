"""SAEs of ten features, and an edit of one, for tests of the field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Facts:
    """An SAE of ten features whose first five have a recorded maximum of 2.5."""

    hook: str = "blocks.1.hook_resid_post"
    d_sae: int = 10
    error_term: bool = True
    affine: bool = True
    read_at: str | None = None
    also_at: tuple[str, ...] = ()

    @property
    def reads(self) -> str:
        return self.read_at or self.hook

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.hook, *self.also_at)

    def max_activation(self, feature: int) -> float | None:
        return {5: 0.0}.get(feature, 2.5) if feature < 6 else None


ONE = {"a": Facts()}
TWO = {"a": Facts(), "b": Facts(), "c": Facts(hook="blocks.2.hook_resid_post")}
EDIT = {"feature": 1, "op": "clamp", "value": 2}


def edit(**changes: Any) -> dict[str, Any]:
    """One valid edit with changes; a field set to ``...`` is left out."""
    item = {**EDIT, **changes}
    return {"interventions": [{k: v for k, v in item.items() if v is not ...}]}


HERE = "steering.interventions[0]"
