"""What vLLM's span of a request says of its steering if vLLM traces; never any text.

vLLM makes the span when the request has ended, from what its output processor knows.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any, Final

from steering.request.spec import SteeringSpec

#: `SamplingParams.extra_args` key of the attributes, on their way to the output processor.
SPAN: Final = "steering_span"
#: Where a `RequestState` keeps its attributes.
_KEPT: Final = "steering_span_attributes"
_MARK: Final = "_described_by_vllm_sae"

#: The attributes of the span that is being started.
_starting: ContextVar[dict[str, Any] | None] = ContextVar("steering_span", default=None)


def span_attributes(spec: SteeringSpec) -> dict[str, Any]:
    """Attributes of a steered request's span, in plain types."""
    return {
        "vllm_sae.saes": sorted(spec.all_saes),
        "vllm_sae.ops": sorted({edit.op for edit in spec.edits}),
        "vllm_sae.edits": len(spec.edits),
        "vllm_sae.report": spec.report,
        "vllm_sae.read": spec.read is not None,
    }


def is_traced(vllm_config: Any) -> bool:
    """Whether vLLM was told where to send spans."""
    return vllm_config.observability_config.otlp_traces_endpoint is not None


def describe_spans() -> None:
    """Have vLLM's output processor put the attributes on spans; a second call changes nothing."""
    from vllm.v1.engine.output_processor import OutputProcessor

    if hasattr(OutputProcessor.do_tracing, _MARK):
        return
    OutputProcessor.add_request = _keeping(OutputProcessor.add_request)
    OutputProcessor.do_tracing = _describing(OutputProcessor.do_tracing)


def _keeping(add_request: Any) -> Any:
    @functools.wraps(add_request)
    def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        add_request(self, request, *args, **kwargs)
        params = request.sampling_params
        extra = params.extra_args if params is not None else None
        if extra and SPAN in extra:
            setattr(self.request_states[request.request_id], _KEPT, extra[SPAN])

    return wrapper


def _describing(do_tracing: Any) -> Any:
    @functools.wraps(do_tracing)
    def wrapper(self: Any, output: Any, req_state: Any, *args: Any, **kwargs: Any) -> None:
        attributes = getattr(req_state, _KEPT, None)
        if attributes is None:
            do_tracing(self, output, req_state, *args, **kwargs)
            return
        _watch_span_starts()
        token = _starting.set(attributes)
        try:
            do_tracing(self, output, req_state, *args, **kwargs)
        finally:
            _starting.reset(token)

    setattr(wrapper, _MARK, True)
    return wrapper


@functools.cache
def _watch_span_starts() -> None:
    """Put the attributes on spans as they start: vLLM starts and ends its span in one call."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    class Describe(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            attributes = _starting.get()
            if attributes is not None:
                span.set_attributes(attributes)

    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.add_span_processor(Describe())
