"""Turns what was accepted into a request's plan: names, phases and operations become numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from steering.request.conditions import ABOVE, PROMPT, SO_FAR, STOP, TOKEN, Condition
from steering.request.edits import Edit
from steering.request.float32 import float32
from steering.request.keep import Keep
from steering.request.limits import FLOAT32_TINY, OPS, POSITION_LIMIT
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    COVERS_SINKS,
    COVERS_SPECIAL,
    GATE_ABOVE,
    GATE_BELOW,
    OP_ADD,
    OP_CAP,
    OP_CLAMP,
    OP_FLOOR,
    OP_SCALE,
    SCOPE_PROMPT,
    SCOPE_SO_FAR,
    SCOPE_STOP,
    SCOPE_TOKEN,
    Inspection,
    PlannedEdit,
    PlannedGate,
    PlannedRead,
    SteeringPlan,
)
from steering.request.positions import Positions
from steering.request.probe import Pool, Probe, Tokens
from steering.request.probe_plan import PlannedPool, PlannedProbe, PlannedStream, Window
from steering.request.spec import SteeringSpec

_OP_CODES: Final = {
    "clamp": OP_CLAMP,
    "ablate": OP_CLAMP,
    "scale": OP_SCALE,
    "add": OP_ADD,
    "floor": OP_FLOOR,
    "cap": OP_CAP,
}
assert set(_OP_CODES) == set(OPS)
_SCOPE_CODES: Final = {
    TOKEN: SCOPE_TOKEN,
    SO_FAR: SCOPE_SO_FAR,
    PROMPT: SCOPE_PROMPT,
    STOP: SCOPE_STOP,
}


def make_plan(
    spec: SteeringSpec,
    sae_index: dict[str, int],
    key: str,
    children: int,
    prompt_len: int,
    inspection: Inspection | None = None,
    *,
    awaited: bool = False,
    keep: Keep | None = None,
    probes: Sequence[Probe] = (),
    length: int = POSITION_LIMIT,
    writes: Mapping[str, int] = MappingProxyType({}),
) -> SteeringPlan:
    """Compile a validated spec: names become indices, values float32, positions bits.

    Args:
        spec: what was accepted.
        sae_index: the SAEs' indices by name.
        key: see `SteeringPlan`.
        children: see `SteeringPlan`.
        prompt_len: see `SteeringPlan`.
        inspection: how the whole text is read; None for a client's own request.
        awaited: see `SteeringPlan`.
        keep: see `SteeringPlan`.
        probes: what a study asks for besides the field.
        length: how many tokens vLLM's prompt has; no probe looks further.
        writes: at how many hook points each SAE writes, by name; one that is left out writes at 1.

    Raises:
        SteeringError: ``duplicate_intervention`` if two edits meet in a prompt of this length; see
            `SteeringSpec.at`.
    """
    spec = spec.at(prompt_len)
    gates = spec.gates
    bits = {condition: 1 << i for i, condition in enumerate(gates)}
    read = None
    fit = inspection is not None and inspection.fit
    if spec.read is not None:
        coverage = _coverage(spec.positions)
        if inspection is not None and inspection.special_tokens:
            coverage |= COVERS_SPECIAL | COVERS_SINKS
        read = PlannedRead(
            sae=sae_index[spec.read.sae],
            top_k=spec.read.top_k,
            coverage=coverage,
            start=spec.positions.start,
            end=spec.positions.int32_end,
            aggregate=None if inspection is None else inspection.aggregate,
            stream=spec.read.stream,
            fit=fit,
        )
    return SteeringPlan(
        key,
        children,
        prompt_len,
        tuple(
            _planned_edit(edit, sae_index[edit.sae], bits, writes.get(edit.sae, 1))
            for edit in spec.edits
        ),
        spec.error_term,
        spec.report,
        read,
        awaited,
        gates=tuple(_planned_gate(gate, sae_index[gate.sae]) for gate in gates),
        reread=spec.reread,
        protect=tuple((sae_index[name], feature) for name, feature in spec.protect),
        max_share=_max_share(spec.max_share),
        internal=fit,
        keep=keep,
        probes=tuple(_planned_probe(probe, sae_index, prompt_len, length) for probe in probes),
    )


def _max_share(share: float | None) -> float | None:
    # Whether a token was limited is the sign of its share, and zero has none to tell.
    return None if share is None else max(float32(share), FLOAT32_TINY)


def _planned_probe(
    probe: Probe, sae_index: Mapping[str, int], prompt_len: int, length: int
) -> PlannedProbe:
    sae, windows = sae_index[probe.sae], _windows(probe.tokens, prompt_len, length)
    if isinstance(probe, Pool):
        return PlannedPool(sae, windows, probe.pool, probe.scaled, probe.peaks)
    return PlannedStream(sae, windows, probe.key)


def _windows(tokens: Tokens, prompt_len: int, length: int) -> tuple[Window, ...]:
    at_length = [positions.at(prompt_len) for positions in tokens]
    return tuple(
        dict.fromkeys(
            Window(_coverage(positions), positions.start, min(positions.end, length))
            for positions in at_length
        )
    )


def _planned_edit(edit: Edit, sae: int, bits: Mapping[Condition, int], writes: int) -> PlannedEdit:
    conditions = () if edit.when is None else edit.when.conditions
    return PlannedEdit(
        sae=sae,
        latent=edit.feature,
        op=_OP_CODES[edit.op],
        value=float32(edit.effective_value),
        coverage=_coverage(edit.positions),
        start=edit.positions.start,
        end=edit.positions.int32_end,
        gates=sum(bits[condition] for condition in conditions),
        any_gate=edit.when is not None and edit.when.any,
        writes=writes,
    )


def _planned_gate(condition: Condition, sae: int) -> PlannedGate:
    return PlannedGate(
        sae=sae,
        latent=condition.feature,
        sense=GATE_ABOVE if condition.sense == ABOVE else GATE_BELOW,
        threshold=condition.threshold,
        scope=_SCOPE_CODES[condition.scope],
    )


def _coverage(positions: Positions) -> int:
    return (
        COVERS_PROMPT * positions.prompt
        | COVERS_GENERATION * positions.generation
        | COVERS_SPECIAL * positions.special_tokens
    )
