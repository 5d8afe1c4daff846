"""What validation must know about a loaded SAE, and how a request names its features."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from steering.errors import SteeringError
from steering.request.limits import FLOAT32_MAX
from steering.request.shape_errors import shown


class SAEFacts(Protocol):
    """One loaded SAE.

    Attributes:
        hook: the hook point of its edits, the first of ``writes``.
        reads: the hook point at which its activations are read.
        writes: the hook points to which its edits are added.
        d_sae: number of its features.
        error_term: whether its full reconstruction is defined.
        affine: whether its pre-activations are affine in the stream that it edits.
    """

    @property
    def hook(self) -> str: ...

    @property
    def reads(self) -> str: ...

    @property
    def writes(self) -> tuple[str, ...]: ...

    @property
    def d_sae(self) -> int: ...

    @property
    def error_term(self) -> bool: ...

    @property
    def affine(self) -> bool: ...

    def max_activation(self, feature: int) -> float | None:
        """The recorded maximum activation in raw units; None if it is not known."""
        ...


SAEs = Mapping[str, SAEFacts]


def unknown_sae(name: str, loaded: Iterable[str], param: str | None = None) -> SteeringError:
    """The refusal of a name that no loaded SAE has.

    Args:
        name: the name.
        loaded: the names of the loaded SAEs.
        param: the path of the name, if it has one.
    """
    names = ", ".join(loaded)
    remedy = f": name one of {names}" if names else ", nor any other"
    return SteeringError("unknown_sae", f"no SAE {shown(name)} is loaded{remedy}", param)


def named_sae(name: str | None, param: str, loaded: Collection[str]) -> str:
    """The SAE that a request means; the only one if it names none.

    Args:
        name: as the request states it; None if it names none.
        param: the path of the name.
        loaded: the names of the loaded SAEs, at least one.

    Raises:
        SteeringError: ``unknown_sae`` if no loaded SAE has this name; ``sae_required`` if several
            are loaded and the request names none.
    """
    if name is None:
        if len(loaded) > 1:
            raise SteeringError(
                "sae_required",
                f"{len(loaded)} SAEs are loaded, name one: {', '.join(loaded)}",
                param,
            )
        return next(iter(loaded))
    if name not in loaded:
        raise unknown_sae(name, loaded, param)
    return name


def named_feature(feature: int, path: str, sae: SAEFacts) -> int:
    """``feature`` itself. Raises SteeringError ``feature_out_of_range`` if the SAE has it not."""
    if not 0 <= feature < sae.d_sae:
        raise SteeringError(
            "feature_out_of_range",
            f"feature {shown(feature)} not in [0, {sae.d_sae})",
            f"{path}.feature",
        )
    return feature


def unit_factor(unit: str | None, name: str, feature: int, path: str, saes: SAEs) -> float:
    """What a value of ``unit`` is multiplied by to be in raw units.

    Args:
        unit: None means raw.
        name: name of the SAE.
        feature: index of the feature.
        path: path of the object that states the unit.
        saes: the loaded SAEs.

    Raises:
        SteeringError: ``max_act_unknown`` for max_act if no maximum above 0 is recorded.
    """
    if unit != "max_act":
        return 1.0
    maximum = saes[name].max_activation(feature)
    if maximum is None or not maximum > 0:
        raise SteeringError(
            "max_act_unknown",
            f"feature {feature} of SAE {name!r} has no recorded maximum activation above 0",
            f"{path}.unit",
        )
    return maximum


def raw_value(
    value: float, unit: str | None, name: str, feature: int, path: str, saes: SAEs
) -> float:
    """The ``value`` of the object at ``path`` in raw units; see `unit_factor` for the arguments.

    Raises:
        SteeringError: as `unit_factor`, or ``invalid_value`` if float32 cannot hold the result.
    """
    factor = unit_factor(unit, name, feature, path, saes)
    if abs(value * factor) > FLOAT32_MAX:
        raise SteeringError(
            "invalid_value",
            f"{value} times the maximum of feature {feature}, {factor}, exceeds float32, whose "
            f"largest number is {FLOAT32_MAX:.3g}",
            f"{path}.value",
        )
    return value * factor
