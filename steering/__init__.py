"""Per-request steering of a served model through SAE features.

``steering.SteeringLLM`` is for use without a server. vLLM is imported when that name is first used,
and not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steering.vllm.offline import SteeringLLM

__all__ = ["SteeringLLM"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from steering.vllm import offline

    return getattr(offline, name)
