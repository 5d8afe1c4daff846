"""The one door: every request that reaches the engine is validated, salted and planned here.

``InputProcessor.process_inputs`` is what ``LLM``, ``AsyncLLM`` and vLLM's HTTP handlers share, so
wrapping it catches a request whichever way it came in.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final

from steering.config import SteeringConfig
from steering.errors import SteeringError
from steering.request.cache_salt import cache_salt, unsteered_salt
from steering.request.catalog import Catalog
from steering.request.plan import SELF_CHECK, Inspection, SteeringPlan, make_plan
from steering.request.spec import SteeringSpec
from steering.vllm.tracing import SPAN, span_attributes

#: `SamplingParams.extra_args` key of the public field's JSON value.
FIELD: Final = "steering"
#: Key of a ticket, where the caller wants results back.
TICKET: Final = "steering_ticket"
#: Key of what `inspect` adds to a read: `{"aggregate": str, "special_tokens": bool}`.
INSPECT: Final = "steering_inspect"
#: Key under which the workers and the scheduler find the plan.
PLAN: Final = "steering_plan"

#: Activations, 5 bytes each, that a report of several choices may be of.
MAX_REPORT_VALUES: Final = 2**25

#: Keys that no client may fill; offline, `FIELD` is the caller's.
RESERVED: Final = frozenset({FIELD, TICKET, INSPECT, PLAN, SPAN})


@functools.lru_cache(maxsize=8)
def _catalog(config: SteeringConfig | None, max_model_len: int) -> Catalog:
    return Catalog.from_config(config, max_model_len)


def catalog_for(vllm_config: Any) -> Catalog:
    """The catalog of an engine, opened once in each process."""
    config = SteeringConfig.from_additional_config(vllm_config.additional_config)
    return _catalog(config, vllm_config.model_config.max_model_len)


def admit(request: Any, catalog: Catalog, *, traced: bool = False) -> None:
    """Turn the public field in an ``EngineCoreRequest``'s parameters into a salted plan.

    Does nothing to a request that has no ``steering``. The request's parameters are its own copy.
    Where it is ``traced``, the attributes of its span go along.

    Raises:
        SteeringError: a ``ValueError``, before anything of the request has run.
    """
    request.cache_salt = unsteered_salt(request.cache_salt)
    params = request.sampling_params
    extra = params.extra_args if params is not None else None
    if not extra or not RESERVED & extra.keys():
        return
    rest = {k: v for k, v in extra.items() if k not in RESERVED}
    params.extra_args = rest or None
    if extra.get(FIELD) is None:
        return
    spec = catalog.parse(extra[FIELD])
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        raise SteeringError(
            "unsupported_combination", "steering needs a prompt of tokens, not embeddings", FIELD
        )
    if request.resumable:
        raise SteeringError(
            "unsupported_combination", "steering does not work with streamed input", FIELD
        )
    prompt_len = len(request.prompt_token_ids)
    _refuse_long_read(spec, extra.get(INSPECT), params, prompt_len, catalog.max_read_values)
    _refuse_long_report(spec, params, prompt_len)
    checksums = catalog.prepare_now(spec)
    request.cache_salt = cache_salt(spec, checksums, prompt_len, request.cache_salt)
    if spec.read is not None:
        params.skip_reading_prefix_cache = True
    plan = make_plan(
        spec,
        catalog.index,
        key=result_key(extra.get(TICKET), request.request_id),
        children=params.n,
        prompt_len=prompt_len,
        inspection=_inspection(extra.get(INSPECT)),
        awaited=TICKET in extra,
    )
    params.extra_args = {**rest, PLAN: plan.to_wire()}
    if traced:
        params.extra_args[SPAN] = span_attributes(spec)


def refuse_long_results(prompt: Any, params: Any, vllm_config: Any) -> None:
    """Refuse a read or a report that `admit` would, before its request is handed to the engine.

    When `admit` sees it, its response may have begun to stream, or others of its batch may run.

    Args:
        prompt: as vLLM has rendered it; where it has not, `admit` refuses.
        params: the ``SamplingParams``.
        vllm_config: the engine's.
    """
    extra = getattr(params, "extra_args", None)
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    if not extra or extra.get(FIELD) is None or ids is None or params.max_tokens is None:
        return
    catalog = catalog_for(vllm_config)
    spec = catalog.parse(extra[FIELD])
    _refuse_long_read(spec, extra.get(INSPECT), params, len(ids), catalog.max_read_values)
    _refuse_long_report(spec, params, len(ids))


def _refuse_long_report(spec: SteeringSpec, params: Any, prompt_len: int) -> None:
    if not spec.report:
        return
    # Activations are kept until the last choice ends: where a choice will end is not known.
    tokens = prompt_len + params.max_tokens
    values = tokens * len(spec.edits) * params.n
    if params.n > 1 and values > MAX_REPORT_VALUES:
        raise SteeringError(
            "invalid_value",
            f"a report of {len(spec.edits)} edits of up to {tokens} tokens in {params.n} choices "
            f"is of {values} activations, the limit is {MAX_REPORT_VALUES}: lower max_tokens or n",
            "steering.report",
        )


def _refuse_long_read(
    spec: SteeringSpec, inspect: Mapping[str, Any] | None, params: Any, prompt_len: int, limit: int
) -> None:
    if spec.read is None or (inspect is not None and inspect["aggregate"] == SELF_CHECK):
        return
    tokens = spec.positions.count(prompt_len, prompt_len + params.max_tokens)
    values = tokens * spec.read.top_k * params.n
    if values > limit:
        choices = f" in {params.n} choices" if params.n > 1 else ""
        remedy = "lower max_tokens, top_k or n, or narrow positions with start and end"
        raise SteeringError(
            "invalid_value",
            f"a read of {spec.read.top_k} features of up to {tokens} tokens{choices} is {values} "
            f"values, the limit is {limit}: "
            + (remedy if inspect is None else "lower top_k, or send less text"),
            "steering.read" if inspect is None else "top_k",
        )


def plan_of(params: Any) -> SteeringPlan | None:
    """The plan in a ``SamplingParams``, None for an unsteered request."""
    extra = params.extra_args if params is not None else None
    wire = extra.get(PLAN) if extra else None
    return None if wire is None else SteeringPlan.from_wire(wire)


def result_key(ticket: str | None, request_id: str) -> str:
    """What names a request's results: tickets keep clients' equal request ids apart."""
    return request_id if ticket is None else f"{ticket}/{request_id}"


def child_index(plan: SteeringPlan, req_id: str) -> int:
    """Which of the ``n`` children a worker's request is; vLLM names them ``INDEX_PARENT``."""
    return int(req_id.split("_", 1)[0]) if plan.children > 1 else 0


def _inspection(raw: Mapping[str, Any] | None) -> Inspection | None:
    return None if raw is None else Inspection(raw["aggregate"], raw["special_tokens"])
