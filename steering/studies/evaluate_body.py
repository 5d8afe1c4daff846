"""The body of an evaluation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import ConfigDict, Field, Strict, StrictBool, StrictInt, StrictStr

from steering.request.shape import Shape
from steering.studies.body import SteeringValue, StudyBody
from steering.studies.texts import Texts

MAX_CONFIGURATIONS: Final = 16
DEFAULT_MAX_TOKENS: Final = 64
DEFAULT_TOP_K: Final = 10
MAX_TOP_K: Final = 1000


class ConfigurationBody(Shape):
    """What is tried: an edit, none, or a system message."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringConfiguration")

    name: StrictStr
    steering: SteeringValue = Field(
        default=None,
        description="As in a request; without interventions it is a control. Either this or "
        "`system`.",
    )
    system: StrictStr | None = Field(
        default=None, description="A system message that replaces the text's own."
    )


class FeaturesBody(Shape):
    """An SAE at which texts are read."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringEvaluatedSAE")

    sae: StrictStr | None = Field(default=None, description="May be left out if one is loaded.")
    top_k: Annotated[StrictInt, Field(ge=1, le=MAX_TOP_K)] | None = Field(
        default=None, description=f"Features that moved most (default {DEFAULT_TOP_K})."
    )


#: Entries of `features`; the answer has each of them for every configuration.
MAX_FEATURES: Final = 64

_Configurations = Annotated[
    list[ConfigurationBody], Strict(), Field(min_length=1, max_length=MAX_CONFIGURATIONS)
]


class Body(StudyBody):
    """The body of an evaluation."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringEvaluationRequest")

    texts: Texts
    configurations: _Configurations = Field(description="Their names are distinct.")
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None,
        description="Tokens of an answer, which each configuration gives to a text without "
        f"completion (default {DEFAULT_MAX_TOKENS}).",
    )
    features: Annotated[list[FeaturesBody], Strict(), Field(max_length=MAX_FEATURES)] | None = (
        Field(
            default=None,
            description="SAEs at which the same texts are read, unsteered and steered.",
        )
    )
    interactions: StrictBool | None = Field(
        default=None, description="Whether each edit is tried alone as well."
    )
    detail: StrictBool | None = Field(
        default=None, description="Whether figures of every token are returned."
    )
