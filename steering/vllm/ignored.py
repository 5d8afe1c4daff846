"""Refuses requests that ask for steering where nothing would steer, instead of running them plain.

vLLM's request types keep fields that they do not know, and ignore them. `vllm run-batch` reads its
lines into these types, and so does a `vllm serve` whose list of plugins leaves out this project's
routes.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from steering.errors import SteeringError
from steering.request.misplaced import CONTAINERS, FIELD, misplaced

_MARK: Final = "_refuses_ignored_steering"


def refuse_ignored_steering() -> None:
    """Have vLLM's own request types refuse steering that they would drop.

    They do so when sampling parameters are made of them. A second call changes nothing.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for kind in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        if not hasattr(kind.to_sampling_params, _MARK):
            kind.to_sampling_params = _refusing(kind.to_sampling_params)


def _refusing(to_sampling_params: Any) -> Any:
    @functools.wraps(to_sampling_params)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if FIELD not in type(self).model_fields:
            refuse_ignored(self)
        return to_sampling_params(self, *args, **kwargs)

    setattr(wrapper, _MARK, True)
    return wrapper


def refuse_ignored(request: Any) -> None:
    """Raise SteeringError if a request of one of vLLM's own types has `steering` in any place."""
    unknown = request.model_extra or {}
    known = {name: value for name in CONTAINERS if (value := getattr(request, name, None))}
    if not unknown and not known:
        return
    path = FIELD if unknown.get(FIELD) is not None else misplaced({**unknown, **known})
    if path is not None:
        raise SteeringError(
            "steering_unavailable",
            "vLLM's own commands cannot steer; run `vllm-sae serve` or `vllm-sae run-batch` with "
            f"--sae NAME=SOURCE, and send `{FIELD}` as a field of the body",
            path,
        )
