"""A request's ``steering`` after validation, on its way from the route to the engine's door."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from steering.report import Ticket, wants_report
from steering.request.catalog import Catalog, Prepared
from steering.request.keep import Keep
from steering.request.plan import Inspection
from steering.request.probe import Probe
from steering.request.spec import SteeringSpec


@dataclass(frozen=True, eq=False)
class Accepted:
    """What a valid ``steering`` field asks for; nothing after this parses the field again.

    It travels as an object in ``SamplingParams.extra_args`` as far as the door, which makes a plan
    of it. vLLM copies those parameters deeply, and every copy shares this one object.

    Attributes:
        spec: the validated field.
        prepared: what the SAEs' weights say about it.
        inspection: how `inspect` and the self-check read; None for a client's own request.
        prompt_len: where generation begins if not at the end of vLLM's prompt: the reader makes a
            whole text vLLM's prompt, and a part of it counts as generated.
        ticket: where the reports go; None if nobody asked for any, or if they are fetched by hand.
        awaited: whether what is recorded will in any case be fetched, or forgotten by name.
        keep: the final hidden states that a study has kept.
        probes: what a study wants to know about the text.
    """

    spec: SteeringSpec
    prepared: Prepared
    inspection: Inspection | None = None
    prompt_len: int | None = None
    ticket: Ticket | None = None
    awaited: bool = False
    keep: Keep | None = None
    probes: tuple[Probe, ...] = ()

    @property
    def reports(self) -> bool:
        """Whether anything is returned besides the answer."""
        return wants_report(self.spec) or bool(self.probes)

    def reporting_to(self, ticket: Ticket) -> Accepted:
        """The same, with its reports put on ``ticket``."""
        return replace(self, ticket=ticket, awaited=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Accepted:
        return self


def accept(raw: object, catalog: Catalog, inspection: Inspection | None = None) -> Accepted:
    """Validate a ``steering`` field and check the weights that it needs.

    This may read whole files, so code on an event loop awaits `Catalog.prepare` instead.

    Args:
        raw: the field's JSON value.
        catalog: the loaded SAEs.
        inspection: how a whole text is read; None for a client's own request.

    Raises:
        SteeringError: if the field is not valid or the weights cannot be used, with the code and
            path that `Catalog.parse` and `Catalog.prepare_now` give.
    """
    spec = catalog.parse(raw)
    return Accepted(spec, catalog.prepare_now(spec), inspection)
