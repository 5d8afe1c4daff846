"""What a request's ``when`` and ``stop_when`` mean, and which of them are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sae.pass_order import place_in_pass
from steering.errors import SteeringError
from steering.request.conditions import ABOVE, BELOW, PROMPT, STOP, TOKEN, Condition, When
from steering.request.facts import SAEs, named_feature, named_sae, unit_factor
from steering.request.float32 import float32
from steering.request.limits import FLOAT32_MAX, MAX_GATES
from steering.request.shape import AnyShape, ConditionShape, StopShape

WhenValue = ConditionShape | list[ConditionShape] | AnyShape | str


def parse_when(raw: WhenValue, path: str, saes: SAEs) -> When | None:
    """The conditions of a ``when``; None if it is "always".

    Raises:
        SteeringError: with the code and path of what is wrong, if something is.
    """
    if isinstance(raw, str):
        return None
    if isinstance(raw, ConditionShape):
        found = {_condition(raw, path, saes)}
    else:
        items, list_path = (raw.any, f"{path}.any") if isinstance(raw, AnyShape) else (raw, path)
        found = {_condition(item, f"{list_path}[{i}]", saes) for i, item in enumerate(items)}
    any_holds = isinstance(raw, AnyShape) and len(found) > 1
    return When(tuple(sorted(found)), any_holds, path)


def parse_stop_when(raw: StopShape | list[StopShape] | None, saes: SAEs) -> tuple[Condition, ...]:
    """The conditions any of which ends the answer, sorted and distinct.

    Raises:
        SteeringError: with the code and path of what is wrong, if something is.
    """
    path = "steering.stop_when"
    if raw is None:
        return ()
    if isinstance(raw, StopShape):
        return (_stop(raw, path, saes),)
    return tuple(sorted({_stop(item, f"{path}[{i}]", saes) for i, item in enumerate(raw)}))


def refuse_too_many(whens: Iterable[When | None], stops: tuple[Condition, ...]) -> None:
    """Raise SteeringError ``invalid_value`` for more than `MAX_GATES` distinct conditions."""
    distinct: set[Condition] = set()
    parts = [(when.conditions, when.path) for when in whens if when is not None]
    for conditions, path in (*parts, (stops, "steering.stop_when")):
        distinct.update(conditions)
        if len(distinct) > MAX_GATES:
            raise SteeringError(
                "invalid_value",
                f"more than {MAX_GATES} distinct conditions, counting those of stop_when",
                path,
            )


def refuse_too_late(when: When, sae: str, covers_prompt: bool, saes: SAEs) -> None:
    """Refuse a condition that is not yet known where an edit of ``sae`` is made.

    Raises:
        SteeringError: ``condition_too_late`` if it is read at a later hook point; ``invalid_value``
            if it has scope `PROMPT` and the edit covers the prompt.
    """
    made = min(saes[sae].writes, key=place_in_pass)
    for condition in when.conditions:
        if condition.scope == PROMPT:
            if covers_prompt:
                raise SteeringError(
                    "invalid_value",
                    "a condition of scope prompt is decided at the prompt's end, so its edit may "
                    "cover generation only: set positions.prompt to false",
                    when.path,
                )
            continue
        reads = saes[condition.sae].reads
        if place_in_pass(reads) > place_in_pass(made):
            raise SteeringError(
                "condition_too_late",
                f"feature {condition.feature} of SAE {condition.sae!r} is read at {reads}, after "
                f"the edit at {made}; only scope prompt may read later",
                when.path,
            )


def refuse_across_stages(
    edits: Iterable[tuple[str, When | None]], saes: SAEs, stage_of: Callable[[str], int]
) -> None:
    """Refuse a condition that is read on another pipeline stage than its edit is made on.

    Args:
        edits: the SAE and the conditions of each edit.
        saes: the loaded SAEs.
        stage_of: tells the pipeline stage that holds a hook point.

    Raises:
        SteeringError: ``unsupported_combination`` if there is such a condition.
    """
    for name, when in edits:
        stages = {stage_of(hook) for hook in saes[name].writes}
        for condition in () if when is None else when.conditions:
            reads = saes[condition.sae].reads
            if {stage_of(reads)} != stages:
                assert when is not None
                raise SteeringError(
                    "unsupported_combination",
                    f"the condition at {reads} and the edit at {saes[name].hook} are on different "
                    "pipeline stages; serve without pipeline parallelism, or use hook points of "
                    "one stage",
                    when.path,
                )


def _condition(raw: ConditionShape, path: str, saes: SAEs) -> Condition:
    if raw.above is not None and raw.below is not None:
        raise SteeringError("invalid_value", "give above or below, not both", f"{path}.below")
    if raw.below is not None:
        return _made(raw, BELOW, raw.below, raw.scope or TOKEN, path, saes)
    if raw.above is None:
        raise SteeringError("invalid_value", "a condition needs above or below", f"{path}.above")
    return _made(raw, ABOVE, raw.above, raw.scope or TOKEN, path, saes)


def _stop(raw: StopShape, path: str, saes: SAEs) -> Condition:
    return _made(raw, ABOVE, raw.above, STOP, path, saes)


def _made(
    raw: ConditionShape | StopShape, sense: str, bound: float, scope: str, path: str, saes: SAEs
) -> Condition:
    name = named_sae(raw.sae, f"{path}.sae", saes)
    feature = named_feature(raw.feature, path, saes[name])
    # No activation is larger than float32 holds, so a bound past that is the same as its largest.
    threshold = min(bound * unit_factor(raw.unit, name, feature, path, saes), FLOAT32_MAX)
    return Condition(name, feature, sense, float32(threshold) + 0.0, scope)
