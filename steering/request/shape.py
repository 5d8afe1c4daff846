"""The shape of the ``steering`` field: which members it has, and of which types.

The classes are strict about JSON's types: 7.0 is no feature index, true is no number, and null
stands for "left out" in optional members. The rules that need the loaded SAEs are in
``steering.request.parse``. The OpenAPI schema of the field is made of these classes.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)

from steering.request.limits import (
    DEFAULT_TOP_K,
    MAX_CONDITIONS,
    MAX_INTERVENTIONS,
    MAX_PROTECTED,
    MAX_TOP_K,
    POSITION_LIMIT,
    SHARE_LIMIT,
    VALUE_LIMIT,
    Match,
    Op,
    Scope,
    Unit,
)
from steering.request.shape_errors import refusal

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
SAEName = Annotated[
    StrictStr | None, Field(description="Name of the SAE; may be left out when one is loaded.")
]
# The limit is the SAE's, which is not known here: an index past it has a code of its own.
Index = Annotated[
    StrictInt, Field(description="Index in [0, d_sae).", json_schema_extra={"minimum": 0})
]
UnitName = Annotated[
    Unit | None,
    Field(
        description="raw (default), or max_act: times the feature's recorded maximum activation."
    ),
]
Position = Annotated[StrictInt, Field(ge=-POSITION_LIMIT - 1, le=POSITION_LIMIT)]
Threshold = Annotated[Number, Field(ge=0)]
# Few conditions may be distinct, so a longer list would only take longer to refuse.
CONDITIONS: Final = Field(min_length=1, max_length=MAX_CONDITIONS, fail_fast=True)


class Shape(BaseModel):
    """An object with these members and no others."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


class PositionsShape(Shape):
    """Which tokens are covered."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringPositions")

    prompt: StrictBool | None = Field(
        default=None, description="Cover tokens of the prompt (default true)."
    )
    generation: StrictBool | None = Field(
        default=None, description="Cover tokens after the prompt (default true)."
    )
    special_tokens: StrictBool | None = Field(
        default=None,
        description="Cover special tokens and the first token as well (default false).",
    )
    start: Position | None = Field(
        default=None,
        description="First token position, from the prompt's start; negative: from its end.",
    )
    end: Position | None = Field(
        default=None, description="Token position to stop before; negative: from the prompt's end."
    )


class ConditionShape(Shape):
    """A feature's activation f, read before the edits of its own hook point, against a number."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringCondition")

    sae: SAEName = None
    feature: Index
    above: Threshold | None = Field(
        default=None, description="Holds where f > above. Exactly one of above and below."
    )
    below: Threshold | None = Field(default=None, description="Holds where f <= below.")
    unit: UnitName = None
    scope: Scope | None = Field(
        default=None,
        description="token (default): at the edited token; so_far: at it or any earlier one; "
        "prompt: at any token of the prompt.",
    )


class AnyShape(Shape):
    """Conditions of which one must hold."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringAnyCondition")

    any: Annotated[list[ConditionShape], Strict(), CONDITIONS]


class StopShape(Shape):
    """A feature that ends the answer at the first generated token where it fires."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringStopCondition")

    sae: SAEName = None
    feature: Index
    above: Threshold = Field(description="Stop at the first generated token with f > above.")
    unit: UnitName = None


_All = Annotated[list[ConditionShape], Strict(), CONDITIONS]
_Stops = Annotated[list[StopShape], Strict(), CONDITIONS]
_ALL: Final = TypeAdapter(_All)
_STOPS: Final = TypeAdapter(_Stops)
_ALWAYS: Final = TypeAdapter(Literal["always"])

# The alternatives are told apart by hand: pydantic's union would name them in an error's path.


def _when(raw: Any) -> ConditionShape | list[ConditionShape] | AnyShape | Literal["always"]:
    if isinstance(raw, str):
        return _ALWAYS.validate_python(raw)
    if isinstance(raw, list):
        return _ALL.validate_python(raw)
    if isinstance(raw, dict) and "any" in raw:
        return AnyShape.model_validate(raw)
    return ConditionShape.model_validate(raw)


def _stop_when(raw: Any) -> StopShape | list[StopShape]:
    return _STOPS.validate_python(raw) if isinstance(raw, list) else StopShape.model_validate(raw)


WhenShape = Annotated[
    ConditionShape | list[ConditionShape] | AnyShape | Literal["always"],
    PlainValidator(
        _when, json_schema_input_type=ConditionShape | _All | AnyShape | Literal["always"]
    ),
]
StopWhenShape = Annotated[
    StopShape | list[StopShape],
    PlainValidator(_stop_when, json_schema_input_type=StopShape | _Stops),
]


class InterventionShape(Shape):
    """One edit of one feature."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringIntervention")

    sae: SAEName = None
    feature: Index
    op: Op = Field(
        description="clamp f'=v; ablate f'=0; scale f'=v*f; add f'=f+v; floor f'=max(f,v); "
        "cap f'=min(f,v)."
    )
    value: Annotated[Number, Field(ge=-VALUE_LIMIT, le=VALUE_LIMIT)] | None = Field(
        default=None, description="Required except for ablate, which takes none."
    )
    unit: UnitName = None
    positions: PositionsShape | None = Field(
        default=None, description="This edit's own; what it leaves out is the request's."
    )
    when: WhenShape | None = Field(
        default=None,
        description="This edit's own conditions instead of the request's; always lifts those.",
    )


class ReadShape(Shape):
    """Return the strongest features of each covered token."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringRead")

    sae: SAEName = None
    top_k: Annotated[StrictInt, Field(ge=1, le=MAX_TOP_K)] | None = Field(
        default=None, description=f"Features per token (default {DEFAULT_TOP_K})."
    )
    stream: StrictBool | None = Field(
        default=None, description="Return them with the chunks of a streamed answer."
    )


class FeatureShape(Shape):
    """A feature of an SAE."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringFeature")

    sae: SAEName = None
    feature: Index


class SteeringShape(Shape):
    """Steer this request through features of the SAEs in GET /v1/saes."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        title="Steering",
        json_schema_extra={
            "examples": [
                {"interventions": [{"feature": 1234, "op": "clamp", "value": 0}], "report": True}
            ]
        },
    )

    interventions: (
        Annotated[list[InterventionShape], Strict(), Field(max_length=MAX_INTERVENTIONS)] | None
    ) = Field(
        default=None,
        description="Edits of SAE features, applied at once. At least one, unless `read` or "
        "`stop_when` is given.",
    )
    positions: PositionsShape | None = Field(
        default=None, description="The tokens that edits and a read cover."
    )
    error_term: StrictBool | None = Field(
        default=None, description="Keep what the SAE does not explain (default true)."
    )
    match: Match | None = Field(
        default=None,
        description="delta (default): add the change of f; reread: solve the edit so that the "
        "SAE, run again on the edited stream, reads it.",
    )
    protect: (
        Annotated[list[FeatureShape], Strict(), Field(min_length=1, max_length=MAX_PROTECTED)]
        | None
    ) = Field(default=None, description="Features that these edits must not move.")
    max_share: Annotated[Number, Field(gt=0, le=SHARE_LIMIT)] | None = Field(
        default=None,
        description="At each hook point the whole change of a token is scaled down to at most "
        "this share of the norm of the stream there.",
    )
    when: WhenShape | None = Field(
        default=None,
        description="Conditions of every edit that has none of its own: one, a list of which all "
        "must hold, or any of a list.",
    )
    stop_when: StopWhenShape | None = Field(
        default=None, description="End the answer at the first token where a feature fires."
    )
    report: StrictBool | None = Field(
        default=None, description="Say in the response what was edited (default false)."
    )
    read: ReadShape | None = Field(
        default=None, description="Return features of each covered token."
    )


def parse_shape(raw: object) -> SteeringShape:
    """The JSON value of a ``steering`` field as an object of these types.

    Raises:
        SteeringError: if it has another shape, with the code and the path of what is wrong.
    """
    try:
        return SteeringShape.model_validate(raw)
    except ValidationError as error:
        raise refusal(error, raw, "steering", _MEMBERS) from None


def _members(*shapes: type[Shape]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for shape in shapes for name in shape.model_fields))


#: The members that an object may have, by the last name in its path.
_MEMBERS: Final = {
    "": _members(SteeringShape),
    "interventions": _members(InterventionShape),
    "positions": _members(PositionsShape),
    "when": _members(ConditionShape, AnyShape),
    "any": _members(ConditionShape),
    "stop_when": _members(StopShape),
    "protect": _members(FeatureShape),
    "read": _members(ReadShape),
}
