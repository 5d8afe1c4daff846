"""What the routes below /v1/saes answer, for OpenAPI.

Routes answer with plain JSON of their own making; these classes describe it and are never filled.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Index = Annotated[int, Field(ge=0, description="Index of a feature, in [0, d_sae).")]
#: A token's text, and how much a feature raises or lowers its logit.
ScoredToken = tuple[str, float]
#: A feature and a figure of it.
ScoredFeature = tuple[int, float]


class Answer(BaseModel):
    """An object whose members are all there."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


class Card(Answer):
    """A loaded SAE."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SAECard")

    id: str = Field(description="Its name from --sae.")
    object: Literal["sae"]
    kind: Literal["sae", "transcoder", "clt", "crosscoder", "direction"]
    hook: str = Field(description="Where it is edited: the first of writes.")
    reads: str = Field(description="The hook point at which its activations are read.")
    writes: list[str] = Field(description="The hook points to which its edits are added.")
    layer: int
    architecture: str
    d_in: int
    d_sae: int = Field(description="Number of its features.")
    dtype: str
    source: str
    format: str
    sha256: str | None = Field(description="Of the weights; null until something needed it.")
    sink_norm: float | None = Field(
        description="Tokens of a larger norm at its hook point are neither read nor edited."
    )
    error_term: bool = Field(description="Whether its full reconstruction is defined.")
    has_labels: bool
    has_max_activations: bool


class CardList(Answer):
    """All loaded SAEs."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SAECardList")

    object: Literal["list"]
    data: list[Card]


class Feature(Answer):
    """A feature; what is not known of it is null."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SAEFeature")

    feature: Index
    label: str | None
    max_activation: float | None
    density: float | None
    output_score: float | None


class FeatureList(Answer):
    """A page of features."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SAEFeatureList")

    object: Literal["list"]
    data: list[Feature]
    total: int = Field(description="Of all pages.")
    has_more: bool


class Example(Answer):
    """A text on which a feature is active."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SAEFeatureExample")

    text: str
    activation: float | None = Field(description="The largest in the text.")


class FeatureDetail(Feature):
    """A feature, what it is near to and what it writes."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SAEFeatureDetail")

    nearest: list[ScoredFeature] = Field(description="By cosine of the decoder rows.")
    promoted: list[ScoredToken] = Field(description="Tokens whose logits it raises most.")
    suppressed: list[ScoredToken]
    examples: list[Example]
    self_gain: float | None = Field(
        description="W_enc . W_dec: how far the feature's own pre-activation moves if one unit is "
        "added to it; null if the SAE reads another width than it writes."
    )
    interferers: list[ScoredFeature] = Field(
        description="The features whose pre-activations one unit of this one moves most, by size."
    )


class ReadToken(Answer):
    """A token with its strongest features."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringReadToken")

    position: int
    id: int
    text: str
    phase: Literal["prompt", "generation"]
    features: list[ScoredFeature]


class ScoredLabel(Answer):
    """A feature's score over a text."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SAEFeatureScore")

    feature: Index
    score: float
    label: str | None


class InspectAnswer(Answer):
    """What an SAE sees in a text, strongest features first."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="InspectAnswer")

    sae: str
    tokens: list[ReadToken]
    features: list[ScoredLabel]


def answers(model: type[Answer]) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: described as ``model``, sent as the route makes it."""
    return {200: {"model": model, "description": (model.__doc__ or "").strip()}}
