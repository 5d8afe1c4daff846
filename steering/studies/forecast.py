"""What an edit does, computed from weights alone: nothing runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sae.neighbours import most_moved
from sae.solve import gain_matrix, written_rows
from steering.request.catalog import Catalog
from steering.request.edits import Edit
from steering.request.spec import SteeringSpec
from steering.studies.body import SteeringValue, StudyBody
from steering.studies.study import Context

#: How many features are shown that an edit moves and no edit names.
NUM_INTERFERERS: Final = 10


class Body(StudyBody):
    """A `steering` object to look at."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringForecastRequest")

    steering: SteeringValue


class ForecastEdit(BaseModel):
    """What one edit does."""

    sae: str
    feature: int
    self_gain: float | None = Field(
        description="W_enc . W_dec: how far its own pre-activation moves if one unit is added; "
        "null if the SAE reads another width than it writes."
    )
    norm: float | None = Field(
        description="Norm of the change at a token: of W_dec, times the value's size for clamp, "
        "add and floor, times the recorded maximum for ablate and cap, times both abs(v - 1) and "
        "that maximum for scale; null if no maximum is recorded."
    )
    share: float | None = Field(
        description="norm / the median norm of the stream; null if either is not known."
    )
    interferers: list[tuple[int, float, str | None]] = Field(
        description="Features that no edit names, whose pre-activations a unit of this edit moves "
        "most: [feature, change, label], by size."
    )


class ForecastGains(BaseModel):
    """How the edits of one SAE move each other."""

    sae: str
    features: list[int]
    G: list[list[float]] | None = Field(
        description="G[i][j] = W_enc[i] . W_dec[j]; null if the SAE reads another width than it "
        "writes."
    )


class Answer(BaseModel):
    """What an edit does, from weights alone."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringForecast")

    edits: list[ForecastEdit]
    gains: list[ForecastGains]


async def forecast(context: Context, asked: Body) -> dict[str, Any]:
    """Answer POST /v1/steering/forecast.

    Raises:
        SteeringError: if the body cannot be answered, with the code and path of what is wrong.
    """
    spec = (await context.accept(asked.steering, "steering")).spec
    context.progress.expect(len(spec.saes))
    edits: dict[int, dict[str, Any]] = {}
    gains = []
    for name in spec.saes:
        of_sae, gain = await asyncio.to_thread(_of_sae, context.catalog, spec, name)
        edits.update(of_sae)
        gains.append(gain)
        context.progress.step()
    return {
        "edits": [edits[i] for i in sorted(edits)],
        "gains": gains,
    }


def _of_sae(
    catalog: Catalog, spec: SteeringSpec, name: str
) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """The forecasts of one SAE's edits, by index in the request, and how they move each other."""
    sae = catalog.sae(name)
    features = list(dict.fromkeys(edit.feature for edit in spec.edits if edit.sae == name))
    protected = [
        (catalog.sae(other), feature)
        for other, feature in spec.protect
        if catalog.card(other).hook == sae.card.hook
    ]
    G = gain_matrix(sae, features, protected)
    written = written_rows(sae, features, protected)
    norms = written.norm(dim=1)
    if len(sae.card.writes) > 1:
        norms = sae.written_by(features).norm(dim=1)
    moved = [_moved(catalog, name, row, features) if G is not None else [] for row in written]
    found = {}
    for i, edit in enumerate(spec.edits):
        if edit.sae != name:
            continue
        place = features.index(edit.feature)
        norm = _norm(catalog, edit, float(norms[place]))
        found[i] = {
            "sae": name,
            "feature": edit.feature,
            "self_gain": None if G is None else float(G[place, place]),
            "norm": norm,
            "share": _share(catalog, name, norm),
            "interferers": moved[place],
        }
    matrix = None if G is None else G.tolist()
    return found, {"sae": name, "features": features, "G": matrix}


def _moved(catalog: Catalog, name: str, written: Tensor, edited: Sequence[int]) -> list[list[Any]]:
    table = catalog.features(name)
    moved = most_moved(catalog.sae(name), written.float(), edited, NUM_INTERFERERS)
    return [[feature, change, table.label(feature)] for feature, change in moved]


def _norm(catalog: Catalog, edit: Edit, norm: float) -> float | None:
    """The norm of what the edit adds at a token, if one unit adds ``norm``; None if not known."""
    if edit.op in ("clamp", "add", "floor"):
        return norm * abs(edit.effective_value)
    maximum = catalog.features(edit.sae).max_activation(edit.feature)
    if maximum is None:
        return None
    factor = abs(edit.effective_value - 1) if edit.op == "scale" else 1.0
    return norm * factor * maximum


def _share(catalog: Catalog, name: str, norm: float | None) -> float | None:
    median = catalog.stream_norm(name)
    return None if norm is None or not median else norm / median
