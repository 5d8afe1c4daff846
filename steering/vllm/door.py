"""The one door: every request that reaches the engine gets its salt and its plan here.

``InputProcessor.process_inputs`` is what ``LLM``, ``AsyncLLM`` and vLLM's HTTP handlers share, so
wrapping it catches a request whichever way it came in. A ``steering`` field that came over HTTP was
accepted before; any other is accepted here at the latest.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from copy import copy
from typing import Any, Final

from steering.config import RESIDENT_NONE, SteeringConfig
from steering.errors import SteeringError
from steering.report import STOP_REASON
from steering.request.accepted import Accepted, accept
from steering.request.cache_salt import cache_salt, unsteered_salt
from steering.request.catalog import Catalog
from steering.request.engine_limits import EngineLimits
from steering.request.plan import SteeringPlan
from steering.request.planning import make_plan
from steering.vllm.tracing import SPAN, span_attributes

#: Key in `SamplingParams.extra_args` of the public field: its JSON value, or an `Accepted`.
FIELD: Final = "steering"
#: Key in `SamplingParams.extra_args` under which the workers and the scheduler find the plan.
PLAN: Final = "steering_plan"

#: The plans that were decoded last, by the identity of the objects that they were decoded from.
_decoded: Final[dict[int, tuple[Any, SteeringPlan]]] = {}
_MOST_DECODED: Final = 512

#: How many activations, of 5 bytes each, a report of several choices may need.
MAX_REPORT_VALUES: Final = 2**25

#: Keys of `SamplingParams.extra_args` that clients may not fill; offline, callers may fill `FIELD`.
RESERVED: Final = frozenset({FIELD, PLAN, SPAN})


@functools.lru_cache(maxsize=8)
def open_catalog(
    config: SteeringConfig | None, max_model_len: int, limits: EngineLimits
) -> Catalog:
    """The catalog of a configuration, opened once in each process.

    Args:
        config: the SAEs to serve, and how; None if there are none.
        max_model_len: how many tokens a context has at most.
        limits: what the engine cannot do as it is configured.
    """
    return Catalog.from_config(config, max_model_len, limits)


def limits_of(vllm_config: Any) -> EngineLimits:
    """What an engine of this configuration cannot do."""
    from vllm.distributed.utils import get_pp_indices

    stages = vllm_config.parallel_config.pipeline_parallel_size
    speculates = vllm_config.speculative_config is not None
    holds_none = _holds_none(vllm_config)
    if stages == 1:
        return EngineLimits(speculates=speculates, holds_none=holds_none)
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    first_layers = (get_pp_indices(layers, stage, stages)[0] for stage in range(stages))
    return EngineLimits(tuple(first_layers), speculates, holds_none)


def _holds_none(vllm_config: Any) -> bool:
    """Whether SAEs stay in the host's memory beside a model that does not run there."""
    from vllm.platforms import current_platform

    config = SteeringConfig.from_additional_config(vllm_config.additional_config)
    return config is not None and config.resident == RESIDENT_NONE and current_platform.is_cuda()


def catalog_for(vllm_config: Any) -> Catalog:
    """The catalog of an engine, opened once in each process."""
    config = SteeringConfig.from_additional_config(vllm_config.additional_config)
    return open_catalog(config, vllm_config.model_config.max_model_len, limits_of(vllm_config))


def accepted_of(params: Any) -> Accepted | None:
    """What these ``SamplingParams`` carry as accepted; None if that is nothing."""
    field = _field(params)
    return field if isinstance(field, Accepted) else None


def with_accepted(params: Any, vllm_config: Any) -> Any:
    """``params`` with their ``steering`` accepted: a copy, or themselves if there is nothing to do.

    Raises:
        SteeringError: if the field is not valid.
    """
    field = _field(params)
    if field is None or isinstance(field, Accepted):
        return params
    return carrying(params, accept(field, catalog_for(vllm_config)))


def carrying(params: Any, accepted: Accepted) -> Any:
    """A copy of ``SamplingParams`` with this ``steering``; the caller's object stays as it is."""
    copied = copy(params)
    copied.extra_args = {**(params.extra_args or {}), FIELD: accepted}
    return copied


def complete(request: Any, catalog: Catalog, *, traced: bool = False) -> Accepted | None:
    """Turn what was accepted of an ``EngineCoreRequest`` into its salt and plan.

    Only what needs the prompt's length is done here. A request without ``steering`` only has its
    own ``cache_salt`` hashed if that could be the salt of a steered one. The request's parameters
    are its own copy; what was accepted is taken out of them, since only plain types go on to the
    engine.

    Args:
        request: vLLM's ``EngineCoreRequest``, changed in place.
        catalog: the catalog of the engine.
        traced: whether vLLM traces, so that attributes for the request's span go along.

    Returns:
        What was accepted; None for a request without ``steering``.

    Raises:
        SteeringError: a ``ValueError``, before any part of the request has run.
    """
    request.cache_salt = unsteered_salt(request.cache_salt)
    params = request.sampling_params
    extra = params.extra_args if params is not None else None
    if not extra or not RESERVED & extra.keys():
        return None
    rest = {k: v for k, v in extra.items() if k not in RESERVED}
    params.extra_args = rest or None
    field = extra.get(FIELD)
    if field is None:
        return None
    accepted = field if isinstance(field, Accepted) else accept(field, catalog)
    _refuse_what_has_no_tokens(request)
    _refuse_ambiguous_stop(accepted, params)
    _refuse_unstreamed(accepted)
    length = len(request.prompt_token_ids)
    _refuse_long(accepted, params, length, catalog.max_read_values)
    spec = accepted.spec
    prompt_len = length if accepted.prompt_len is None else accepted.prompt_len
    request.cache_salt = cache_salt(
        spec, accepted.prepared.fingerprints, prompt_len, request.cache_salt
    )
    if spec.skips_prefix_cache:
        params.skip_reading_prefix_cache = True
    plan = make_plan(
        spec,
        catalog.index,
        key=result_key(accepted, request.request_id),
        children=params.n,
        prompt_len=prompt_len,
        inspection=accepted.inspection,
        awaited=accepted.awaited,
        keep=accepted.keep,
        probes=accepted.probes,
        length=length,
        writes=catalog.writes,
    )
    params.extra_args = {**rest, PLAN: plan.to_wire()}
    if traced:
        params.extra_args[SPAN] = span_attributes(spec)
    return accepted


def refuse_early(prompt: Any, params: Any, vllm_config: Any) -> None:
    """Refuse what `complete` would refuse, before the engine is handed the request.

    When `complete` sees a request, its response may have begun to stream, or others of its batch
    may run. This refuses an ambiguous stop string, a streamed read of an answer that is not
    streamed, edits of one feature whose windows meet in this prompt, and a read or report that is
    too long.

    Args:
        prompt: the prompt as vLLM rendered it. If it is not rendered yet, what depends on its
            length is left to `complete`.
        params: the ``SamplingParams``, with what was accepted in them.
        vllm_config: the engine's configuration.

    Raises:
        SteeringError: if the request is refused.
    """
    accepted = accepted_of(params)
    if accepted is not None:
        _refuse_ambiguous_stop(accepted, params)
        _refuse_unstreamed(accepted)
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    if accepted is None or ids is None:
        return
    accepted.spec.at(len(ids) if accepted.prompt_len is None else accepted.prompt_len)
    if params.max_tokens is None:
        return
    _refuse_long(accepted, params, len(ids), catalog_for(vllm_config).max_read_values)


def _refuse_what_has_no_tokens(request: Any) -> None:
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        raise SteeringError(
            "unsupported_combination", "steering needs a prompt of tokens, not embeddings", FIELD
        )
    if request.resumable:
        raise SteeringError(
            "unsupported_combination", "steering does not work with streamed input", FIELD
        )


def _refuse_ambiguous_stop(accepted: Accepted, params: Any) -> None:
    """Refuse a stop string that ``stop_reason`` could not tell from a ``stop_when``."""
    if accepted.spec.stop_when and STOP_REASON in (params.stop or ()):
        raise SteeringError(
            "unsupported_combination",
            f"stop_when does not work with the stop string {STOP_REASON!r}, which is the "
            "stop_reason of an answer that it ends",
            "steering.stop_when",
        )


def _refuse_unstreamed(accepted: Accepted) -> None:
    """Refuse a read that is to come with the answer's chunks if the answer has none."""
    read = accepted.spec.read
    if read is not None and read.stream and accepted.ticket is None:
        raise SteeringError(
            "unsupported_combination",
            "read.stream needs an answer that is streamed; leave it out, and what was read comes "
            "with the answer",
            "steering.read.stream",
        )


def _refuse_long(accepted: Accepted, params: Any, length: int, max_read_values: int) -> None:
    """Refuse results with more values than may be kept.

    Args:
        accepted: what is asked for.
        params: the request's ``SamplingParams``.
        length: how many tokens vLLM's prompt has.
        max_read_values: how many features one request may have read, over all its tokens.

    Raises:
        SteeringError: naming the number and the limit.
    """
    _refuse_long_read(accepted, params, length, max_read_values)
    _refuse_long_report(accepted, params, length)


def _refuse_long_report(accepted: Accepted, params: Any, length: int) -> None:
    edits = len(accepted.spec.edits)
    if not accepted.spec.report:
        return
    # Activations are kept until the last choice ends, and where a choice will end is not known.
    tokens = length + params.max_tokens
    values = tokens * edits * params.n
    if params.n > 1 and values > MAX_REPORT_VALUES:
        raise SteeringError(
            "invalid_value",
            f"a report of {edits} edits on up to {tokens} tokens in {params.n} choices needs "
            f"{values} activations, the limit is {MAX_REPORT_VALUES}: lower max_tokens or n",
            "steering.report",
        )


def _refuse_long_read(accepted: Accepted, params: Any, length: int, limit: int) -> None:
    spec, inspection = accepted.spec, accepted.inspection
    if spec.read is None or (inspection is not None and inspection.fit):
        return
    prompt_len = length if accepted.prompt_len is None else accepted.prompt_len
    tokens = spec.positions.count(prompt_len, length + params.max_tokens)
    values = tokens * spec.read.top_k * params.n
    if values > limit:
        choices = f" in {params.n} choices" if params.n > 1 else ""
        remedy = "lower max_tokens, top_k or n, or narrow positions with start and end"
        raise SteeringError(
            "invalid_value",
            f"a read of {spec.read.top_k} features of up to {tokens} tokens{choices} is {values} "
            f"values, the limit is {limit}: "
            + (remedy if inspection is None else "lower top_k, or send less text"),
            "steering.read" if inspection is None else "top_k",
        )


def refusal_in(error: BaseException) -> SteeringError | None:
    """The refusal that an exception is, or that vLLM's engine wrapped; None if there is none."""
    from vllm.v1.engine.exceptions import EngineGenerateError

    cause = error.__cause__ if isinstance(error, EngineGenerateError) else error
    return cause if isinstance(cause, SteeringError) else None


def plan_of(params: Any) -> SteeringPlan | None:
    """The plan in these ``SamplingParams``; None for an unsteered request."""
    extra = params.extra_args if params is not None else None
    wire = extra.get(PLAN) if extra else None
    if wire is None:
        return None
    # Scheduler and worker ask several times about a request. If they are in one process they share
    # the answer, so that the rows of a plan are worked out only once.
    known = _decoded.get(id(wire))
    if known is not None and known[0] is wire:
        return known[1]
    plan = SteeringPlan.from_wire(wire)
    _decoded[id(wire)] = wire, plan
    if len(_decoded) > _MOST_DECODED:
        _decoded.pop(next(iter(_decoded)), None)
    return plan


def result_key(accepted: Accepted, request_id: str) -> str:
    """The key of a request's results; the ticket's id keeps clients' equal request ids apart."""
    return request_id if accepted.ticket is None else f"{accepted.ticket.id}/{request_id}"


def child_index(plan: SteeringPlan, req_id: str) -> int:
    """Which of the ``n`` choices a worker's request is; vLLM names it ``INDEX_PARENT``."""
    return int(req_id.split("_", 1)[0]) if plan.children > 1 else 0


def _field(params: Any) -> object:
    extra = getattr(params, "extra_args", None)
    return extra.get(FIELD) if extra else None
