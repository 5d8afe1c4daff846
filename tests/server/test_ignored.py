"""Requests of vLLM's own types that ask to be steered are refused wherever vLLM would run them."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from server.protocol import SteerableChatCompletionRequest
from steering.errors import SteeringError
from steering.vllm.plugin import register

STEERING: dict[str, Any] = {"interventions": [{"feature": 5, "op": "ablate"}]}
KINDS: dict[Any, dict[str, Any]] = {
    ChatCompletionRequest: {"messages": [{"role": "user", "content": "hi"}]},
    CompletionRequest: {"prompt": "hi"},
    ResponsesRequest: {"input": "hi"},
}

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"steering": STEERING}, "steering"),
        ({"Steering": STEERING}, "Steering"),
        ({"extra_body": {"steering": STEERING}}, "extra_body.steering"),
        ({"metadata": {"steering": "x"}}, "metadata.steering"),
    ],
)
def test_request_that_would_run_unsteered_is_refused(
    kind: Any, more: dict[str, Any], path: str
) -> None:
    register()
    request = kind.model_validate({**KINDS[kind], **more})
    with pytest.raises(SteeringError) as refused:
        request.to_sampling_params(5, {})
    assert (refused.value.code, refused.value.param) == ("steering_unavailable", path)
    # As `vllm run-batch` answers what a handler raises.
    assert create_error_response(refused.value).error.code == 400


@kinds
def test_other_requests_are_vllms(kind: Any) -> None:
    register()
    more = {"steering": None, "mine": {"steering": 1}, "metadata": {"topic": "steering"}}
    kind.model_validate({**KINDS[kind], **more}).to_sampling_params(5, {})


def test_type_that_has_the_field_is_not_asked() -> None:
    register()
    body = {**KINDS[ChatCompletionRequest], "steering": STEERING}
    SteerableChatCompletionRequest.model_validate(body).to_sampling_params(5, {})
