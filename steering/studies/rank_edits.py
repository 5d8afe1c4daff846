"""What a ranking does to each feature, and at which tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field

from steering.errors import SteeringError
from steering.request.accepted import Accepted, accept
from steering.request.catalog import Catalog
from steering.request.limits import MAX_INTERVENTIONS, VALUE_LIMIT, Op
from steering.request.positions import Positions
from steering.request.probe import Pool
from steering.request.shape import Number, Shape
from steering.studies.reading import pooled
from steering.studies.study import Context
from steering.vllm.reader import Run, Text

TOKEN_MAX: Final = "token_max"
#: The edit if the body has none.
DEFAULT_OP, DEFAULT_VALUE, DEFAULT_UNIT = "clamp", 1.5, "max_act"


class EditBody(Shape):
    """What is done to each feature."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringRankEdit")

    op: Op | None = Field(default=None, description="As in an intervention (default clamp).")
    value: Annotated[Number, Field(ge=-VALUE_LIMIT, le=VALUE_LIMIT)] | None = Field(
        default=None, description="Required except for ablate, which takes none."
    )
    unit: Literal["raw", "max_act", "token_max"] | None = Field(
        default=None,
        description="As in an intervention, but max_act by default (raw for scale); or token_max, "
        "with add: times the largest activation of any feature at the edited token.",
    )


@dataclass(frozen=True)
class RankEdit:
    """What is done to each feature, with defaults filled in.

    Attributes:
        op: as in an intervention.
        value: as in an intervention; None for ablate, or if the body has none.
        unit: as in an intervention, or `TOKEN_MAX`.
        last: whether only the text's last token is edited; else every covered token is.
    """

    op: str
    value: float | None
    unit: str | None
    last: bool

    @classmethod
    def of(cls, body: EditBody | None, *, last: bool) -> RankEdit:
        """What a body asks for. Raises SteeringError if it has token_max with an op but add."""
        if body is None:
            return cls(DEFAULT_OP, DEFAULT_VALUE, DEFAULT_UNIT, last)
        op, value = body.op or DEFAULT_OP, body.value
        unit: str | None = body.unit
        if body.op is None and value is None:
            value = DEFAULT_VALUE
        if unit is None and op not in ("ablate", "scale"):
            unit = DEFAULT_UNIT
        if unit == TOKEN_MAX and op != "add":
            raise SteeringError(
                "invalid_value", f"unit {TOKEN_MAX} goes with add, not with {op}", "edit.unit"
            )
        return cls(op, value, unit, last)

    @property
    def positions(self) -> Positions:
        """The tokens that are edited."""
        return Positions(start=-1) if self.last else Positions()

    def field(self, sae: str, feature: int) -> dict[str, Any]:
        """The `steering` object that edits one feature so; a value in token_max counts as raw."""
        edit = {"sae": sae, "feature": feature, "op": self.op, "value": self.value}
        unit = "raw" if self.unit == TOKEN_MAX else self.unit
        positions = {"start": -1} if self.last else None
        return {"interventions": [{**edit, "unit": unit}], "positions": positions}


def accept_each(
    catalog: Catalog, sae: str, edit: RankEdit, paths: Mapping[int, str]
) -> list[Accepted]:
    """The edit of each feature, validated; this may read whole files.

    Args:
        catalog: the SAEs.
        sae: name of the features' SAE.
        edit: what is done to each feature.
        paths: each feature's path in the body.

    Raises:
        SteeringError: if an intervention like this would be refused; `param` is the member of
            `edit`, or the feature, that is at fault.
    """
    found = []
    for feature, path in paths.items():
        try:
            found.append(accept(edit.field(sae, feature), catalog))
        except SteeringError as error:
            name = (error.param or "").rpartition(".")[2]
            of_edit = name in ("op", "value", "unit") and error.code != "max_act_unknown"
            param = f"edit.{name}" if of_edit else path
            raise SteeringError(error.code, error.message, param) from None
    return found


async def covering(
    context: Context, sae: str, text: Text, edit: RankEdit, edits: list[Accepted], where: str
) -> list[Accepted]:
    """Make sure that the edits cover some token, and with token_max give them their values.

    Only the worker knows which tokens are special or sinks, so one run finds that out.

    Args:
        context: the study's context.
        sae: name of the features' SAE.
        text: the text that is edited.
        edit: what is done to each feature.
        edits: what `accept_each` made of it, at least one.
        where: path of the text in the body.

    Returns:
        The edits; with token_max each has one intervention a covered token.

    Raises:
        SteeringError: ``invalid_value`` if nothing is covered, or if token_max needs more values
            than one request may have edits.
    """
    if edit.unit == TOKEN_MAX:
        maxima = await _token_maxima(context, sae, text, edit.positions)
        covered = len(maxima)
    else:
        maxima = {}
        covered = await _tokens_edited(context, text, edits[0])
    if not covered and edit.last:
        raise SteeringError(
            "invalid_value",
            "no edit covers the text's last token: it is special, the first token, or a sink",
            "at",
        )
    if not covered:
        raise SteeringError(
            "invalid_value",
            "no edit covers the text: it has only special tokens, a first token and sinks",
            where,
        )
    if len(maxima) > MAX_INTERVENTIONS:
        raise SteeringError(
            "invalid_value",
            f"{TOKEN_MAX} needs an edit for each of {covered} tokens, the limit is "
            f"{MAX_INTERVENTIONS}: shorten the text, or set at to last",
            "edit.unit",
        )
    return [_at_each_token(accepted, maxima) for accepted in edits] if maxima else edits


async def _token_maxima(
    context: Context, sae: str, text: Text, positions: Positions
) -> dict[int, float]:
    """The largest activation of any feature at each covered token, by position.

    An edited run would read the same: edits of one SAE change the stream nowhere before the place
    where that SAE reads it.
    """
    pool = Pool(sae, (positions,), peaks=True)
    (read,) = await pooled(context.reader, context.catalog, [text], pool)
    if read.peaks is None:
        return {}
    at, largest = read.peaks
    return dict(zip(at.tolist(), largest.tolist(), strict=True))


def _at_each_token(accepted: Accepted, maxima: Mapping[int, float]) -> Accepted:
    """One edit for each token: its value is multiplied by the token's largest activation."""
    (edit,) = accepted.spec.edits
    edits = tuple(
        replace(
            edit,
            effective_value=edit.effective_value * largest,
            positions=replace(edit.positions, start=position, end=position + 1),
        )
        for position, largest in maxima.items()
    )
    return replace(accepted, spec=replace(accepted.spec, edits=edits))


async def _tokens_edited(context: Context, text: Text, accepted: Accepted) -> int:
    """How many tokens an edit covers, found by running the text with it."""
    asking = replace(accepted, spec=replace(accepted.spec, report=True))
    report = (await context.reader.run(Run.of(text, asking))).report
    assert report is not None
    count: int = report.interventions[0]["tokens_edited"]
    return count
