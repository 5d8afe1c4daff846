"""Admission of one request: its `steering` is accepted before the engine hears of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from server.metrics import count_accepted
from server.presets.models import Meant
from server.protocol import Steerable
from steering.errors import SteeringError
from steering.report import wants_report
from steering.request.accepted import Accepted
from steering.request.catalog import Catalog
from steering.request.lay_over import lay_over
from steering.request.plan import Inspection
from steering.request.spec import SteeringSpec, nothing_loaded
from steering.vllm.door import FIELD

UNSUPPORTED: Final = "unsupported_combination"


def refuse_smuggled(extra_args: object, param: str, catalog: Catalog) -> None:
    """Raises SteeringError if a client puts steering into the engine's extra arguments itself.

    Every key there that begins with the field's name is reserved.
    """
    if not isinstance(extra_args, Mapping):
        return
    for key in extra_args:
        if not (isinstance(key, str) and key.startswith(FIELD)):
            continue
        if not catalog.names:
            raise nothing_loaded()
        raise SteeringError(
            UNSUPPORTED,
            f"send `steering` as a field of the request, not in {param}",
            f"{param}.{key[:80]}",
        )


async def accept(
    request: Steerable,
    catalog: Catalog,
    inspection: Inspection | None = None,
    meant: Meant | None = None,
) -> Accepted | None:
    """Validate a request's steering; None if it has none. Nothing else parses it.

    Args:
        request: its sampling parameters are to carry what is accepted.
        catalog: the SAEs.
        inspection: how the request reads, if it comes from `inspect`.
        meant: the preset that its model's name stands for.

    Raises:
        SteeringError: with the code and path of the error table.
    """
    refuse_smuggled(getattr(request, "vllm_xargs", None), "vllm_xargs", catalog)
    opted_out = meant is not None and meant.by_default and _opts_out(request.steering)
    if opted_out:
        meant = None
    if meant is None and request.steering is None:
        return None
    if meant is None:
        spec = catalog.parse(request.steering, empty_allowed=opted_out)
    else:
        only_sae = catalog.names[0] if len(catalog.names) == 1 else None
        spec = catalog.parse(lay_over(meant.preset.steering, request.steering, only_sae))
    _refuse_combinations(request, spec)
    accepted = Accepted(spec, await catalog.prepare(spec), inspection)
    count_accepted(spec, None if meant is None else meant.preset.name)
    return accepted


def _opts_out(steering: object) -> bool:
    """Whether a request to the base model wants none of what the default preset does."""
    return isinstance(steering, Mapping) and steering.get("interventions") == []


def _refuse_combinations(request: Steerable, spec: SteeringSpec) -> None:
    if getattr(request, "use_beam_search", False):
        raise _combination("beam search, which leaves and re-enters the engine at each token")
    if getattr(request, "prompt_embeds", None) is not None or _has_embeds(request):
        raise _combination("prompt_embeds, which have no tokens")
    if spec.read is not None and spec.read.stream and not getattr(request, "stream", False):
        raise SteeringError(
            UNSUPPORTED,
            "read.stream needs an answer that is streamed; leave it out, or set stream to true",
            "steering.read.stream",
        )
    if getattr(request, "background", False) and wants_report(spec):
        raise _combination("background if it has a report, a read or a stop_when")


def _has_embeds(request: Steerable) -> bool:
    messages = getattr(request, "messages", None)
    return isinstance(messages, list) and any(
        _get(part, "type") == "prompt_embeds"
        for message in messages
        for part in _parts(_get(message, "content"))
    )


def _parts(content: object) -> Iterable[object]:
    return content if isinstance(content, list) else ()


def _get(item: object, key: str) -> object:
    return item.get(key) if isinstance(item, Mapping) else getattr(item, key, None)


def _combination(what: str) -> SteeringError:
    return SteeringError(UNSUPPORTED, f"steering cannot be combined with {what}", FIELD)
