"""A validated request on its way to the workers: indices and numbers alone, fit for msgpack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

from steering.request.keep import Keep
from steering.request.limits import POSITION_LIMIT
from steering.request.probe_plan import (
    PlannedPool,
    PlannedProbe,
    PlannedStream,
    Window,
    probe_from_wire,
    probe_to_wire,
)

# Bits of an edit's coverage.
COVERS_PROMPT: Final = 1
COVERS_GENERATION: Final = 2
COVERS_SPECIAL: Final = 4
#: Only `inspect` sets it: sinks are read like any other token.
COVERS_SINKS: Final = 8

# Codes of the operations on the device. `ablate` arrives as a clamp to zero.
OP_CLAMP, OP_SCALE, OP_ADD, OP_FLOOR, OP_CAP = range(5)

# How a gate compares an activation f with its threshold.
GATE_ABOVE, GATE_BELOW = range(2)  # f > threshold, f <= threshold

# The tokens at which a gate looks: see `PlannedGate`.
SCOPE_TOKEN, SCOPE_SO_FAR, SCOPE_PROMPT, SCOPE_STOP = range(4)


@dataclass(frozen=True)
class PlannedGate:
    """One condition, of ``when`` or of ``stop_when``; f is read before the edits of its hook point.

    Attributes:
        sae: index of the SAE.
        latent: index of the latent.
        sense: GATE_ABOVE or GATE_BELOW.
        threshold: float32, in raw units.
        scope: where f is read. SCOPE_TOKEN: at the edited token. SCOPE_SO_FAR: at it or any earlier
            token; with GATE_BELOW f must never have been above so far. SCOPE_PROMPT: at any token
            of the prompt; with GATE_BELOW f must be above at none. SCOPE_STOP, of ``stop_when``: at
            generated tokens. Special tokens, the first token and sinks never count; with
            SCOPE_TOKEN a gate is shut there in either sense.
    """

    sae: int
    latent: int
    sense: int
    threshold: float
    scope: int


@dataclass(frozen=True)
class PlannedEdit:
    """One edit: which latent of which SAE, what becomes of it, on which tokens.

    Attributes:
        sae: index of the SAE.
        latent: index of the latent.
        op: OP_CLAMP, OP_SCALE, OP_ADD, OP_FLOOR or OP_CAP.
        value: float32, in raw units; for OP_SCALE the factor.
        coverage: COVERS_PROMPT, COVERS_GENERATION and COVERS_SPECIAL, or-ed.
        start: the first position.
        end: one past the last position.
        gates: bit i is set if the edit depends on the plan's gate i; 0 for an edit without
            conditions.
        any_gate: whether one open gate is enough, else all must be open.
        writes: at how many hook points the edit is added.
    """

    sae: int
    latent: int
    op: int
    value: float
    coverage: int
    start: int
    end: int
    gates: int = 0
    any_gate: bool = False
    writes: int = 1


@dataclass(frozen=True)
class PlannedRead:
    """What to return of the covered tokens: the ``top_k`` strongest features of each.

    Attributes:
        sae: index of the SAE.
        top_k: how many features of each token.
        coverage: as of `PlannedEdit`, or-ed with COVERS_SINKS if sinks are read too.
        start: the first position.
        end: one past the last position.
        aggregate: the figure by which the strongest features of all tokens together are found and
            returned as well; None if they are not.
        stream: whether what each pass reads is handed out as soon as it is known.
        fit: whether none of that is returned, but how well the SAE reconstructs the tokens.
    """

    sae: int
    top_k: int
    coverage: int
    start: int
    end: int
    aggregate: str | None
    stream: bool = False
    fit: bool = False


class RowKey(NamedTuple):
    """What a row on the device is made of: requests share rows whose keys are equal.

    Attributes:
        sae: index of the SAE.
        latent: index of the latent.
        solved_with: with `reread`, the latents of the SAE's edits, this one among them, ascending.
        protected: the (SAE, latent) pairs that the decoder row must not move, ascending.
        write: index, among the hook points where the SAE writes, of the one whose decoder row it
            is.
    """

    sae: int
    latent: int
    solved_with: tuple[int, ...] = ()
    protected: tuple[tuple[int, int], ...] = ()
    write: int = 0

    def of_write(self, write: int) -> RowKey:
        """The row of the same edit at another of the hook points where the edit is added."""
        return RowKey(self.sae, self.latent, self.solved_with, self.protected, write)


@dataclass(frozen=True)
class SteeringPlan:
    """All that the workers must know about one request.

    Attributes:
        key: names the request in results; the children of ``n > 1`` share it.
        children: the request's ``n``.
        prompt_len: tokens in the original prompt; a token below this position is of the prompt,
            any other one is generated.
        edits: the edits, at most `limits.MAX_INTERVENTIONS`, in the order of the request.
        error_term: whether what the SAEs do not explain stays.
        report: whether to record what was edited.
        read: what is read; None for nothing.
        awaited: whether what is recorded will in any case be fetched, or forgotten by name.
        gates: the distinct conditions, at most `limits.MAX_GATES`.
        reread: edits are solved so that the SAE, run again on the edited stream, reads f'.
        protect: (SAE, latent) pairs whose pre-activations the edits must not move.
        max_share: the largest share of the stream's norm that a token's whole change at one hook
            point may be; None for no limit.
        internal: whether no client sent the request; metrics then leave it out.
        keep: the final hidden states that a study has kept.
        probes: what a study wants to know about the text.
    """

    key: str
    children: int
    prompt_len: int
    edits: tuple[PlannedEdit, ...]
    error_term: bool
    report: bool
    read: PlannedRead | None
    awaited: bool = False
    gates: tuple[PlannedGate, ...] = ()
    reread: bool = False
    protect: tuple[tuple[int, int], ...] = ()
    max_share: float | None = None
    internal: bool = False
    keep: Keep | None = None
    probes: tuple[PlannedProbe, ...] = ()

    @cached_property
    def edit_rows(self) -> tuple[RowKey, ...]:
        """The row of each edit at the first hook point where it is added; f is read with it too."""
        with_sae: dict[int, list[int]] = {}
        if self.reread:
            for edit in self.edits:
                with_sae.setdefault(edit.sae, []).append(edit.latent)
        protected = tuple(sorted(self.protect))
        return tuple(
            RowKey(edit.sae, edit.latent, tuple(sorted(with_sae.get(edit.sae, ()))), protected)
            for edit in self.edits
        )

    @cached_property
    def gate_rows(self) -> tuple[RowKey, ...]:
        """The row of each gate."""
        return tuple(RowKey(gate.sae, gate.latent) for gate in self.gates)

    @cached_property
    def rows(self) -> frozenset[RowKey]:
        """All rows that the device must hold for this request."""
        return frozenset(
            [
                *self.gate_rows,
                *(
                    row.of_write(write)
                    for row, edit in zip(self.edit_rows, self.edits, strict=True)
                    for write in range(edit.writes)
                ),
            ]
        )

    @cached_property
    def saes(self) -> frozenset[int]:
        """All SAEs that edit this request's tokens, decide about edits, or are read there."""
        found = {entry.sae for entry in (*self.edits, *self.gates, *self.probes)}
        return frozenset(found if self.read is None else found | {self.read.sae})

    def encoded(self, exact_from_row: Callable[[int], bool]) -> frozenset[int]:
        """The SAEs that must encode this request's tokens in full.

        Args:
            exact_from_row: whether an SAE's activations are known from their own encoder rows.
        """
        found = {edit.sae for edit in self.edits if self._encodes(edit, exact_from_row)}
        found |= {gate.sae for gate in self.gates if not exact_from_row(gate.sae)}
        found |= {probe.sae for probe in self.probes if isinstance(probe, PlannedPool)}
        return frozenset(found if self.read is None else found | {self.read.sae})

    @property
    def kept_streams(self) -> frozenset[int]:
        """The SAEs at which the stream is kept.

        Such passes are full ones, though nothing is encoded.
        """
        return frozenset(probe.sae for probe in self.probes if isinstance(probe, PlannedStream))

    def encoded_until(self, exact_from_row: Callable[[int], bool]) -> int:
        """The position from which on no token needs a full pass.

        Args:
            exact_from_row: as in `encoded`.
        """
        ends = [self._end(e) for e in self.edits if self._encodes(e, exact_from_row)]
        if self.read is not None:
            ends.append(self._end(self.read))
        ends += [self._end(window) for probe in self.probes for window in probe.windows]
        for i, gate in enumerate(self.gates):
            if exact_from_row(gate.sae):
                continue
            if gate.scope == SCOPE_PROMPT:
                ends.append(self.prompt_len)
            elif gate.scope == SCOPE_STOP:
                ends.append(POSITION_LIMIT)
            else:
                ends += [self._end(edit) for edit in self.edits if edit.gates >> i & 1]
        return max(ends, default=0)

    def _encodes(self, edit: PlannedEdit, exact_from_row: Callable[[int], bool]) -> bool:
        if not self.error_term:
            return True
        return not exact_from_row(edit.sae) and (edit.op != OP_ADD or self.report)

    def _end(self, where: PlannedEdit | PlannedRead | Window) -> int:
        """One past the last position that is covered."""
        if where.coverage & COVERS_GENERATION:
            return where.end
        return min(where.end, self.prompt_len)

    @property
    def wants_results(self) -> bool:
        """Whether something is recorded for this request."""
        return self.report or self.read is not None or self.stops or bool(self.probes)

    @property
    def only_keeps(self) -> bool:
        """Whether this request's passes are those of an unsteered one, but for what is kept."""
        return self.keep is not None and not (self.edits or self.gates or self.wants_results)

    @property
    def prompt_decides(self) -> bool:
        """Whether a condition looks at the whole prompt."""
        return any(gate.scope == SCOPE_PROMPT for gate in self.gates)

    @property
    def stops(self) -> bool:
        """Whether a condition may end the request."""
        return any(gate.scope == SCOPE_STOP for gate in self.gates)

    def to_wire(self) -> dict[str, Any]:
        """The plan in plain types, for ``SamplingParams.extra_args``."""
        return {
            "key": self.key,
            "children": self.children,
            "prompt_len": self.prompt_len,
            "edits": [_fields(edit) for edit in self.edits],
            "error_term": self.error_term,
            "report": self.report,
            "read": None if self.read is None else _fields(self.read),
            "awaited": self.awaited,
            "gates": [_fields(gate) for gate in self.gates],
            "reread": self.reread,
            "protect": [list(pair) for pair in self.protect],
            "max_share": self.max_share,
            "internal": self.internal,
            "keep": None if self.keep is None else self.keep.to_wire(),
            "probes": [probe_to_wire(probe) for probe in self.probes],
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> SteeringPlan:
        """The inverse of :meth:`to_wire`."""
        return cls(
            key=wire["key"],
            children=wire["children"],
            prompt_len=wire["prompt_len"],
            edits=tuple(PlannedEdit(*edit) for edit in wire["edits"]),
            error_term=wire["error_term"],
            report=wire["report"],
            read=None if wire["read"] is None else PlannedRead(*wire["read"]),
            awaited=wire["awaited"],
            gates=tuple(PlannedGate(*gate) for gate in wire["gates"]),
            reread=wire["reread"],
            protect=tuple((sae, latent) for sae, latent in wire["protect"]),
            max_share=wire["max_share"],
            internal=wire["internal"],
            keep=None if wire["keep"] is None else Keep.from_wire(wire["keep"]),
            probes=tuple(probe_from_wire(probe) for probe in wire["probes"]),
        )


@dataclass(frozen=True)
class Inspection:
    """How a whole text is read: `inspect`'s strongest features over it, or an engine's self-check.

    Attributes:
        aggregate: the figure by which features are ranked; None in a self-check, which asks instead
            how well the SAE reconstructs the text.
        special_tokens: whether special tokens and sinks are read too.
    """

    aggregate: str | None
    special_tokens: bool

    @property
    def fit(self) -> bool:
        """Whether it is a self-check."""
        return self.aggregate is None


def _fields(item: PlannedEdit | PlannedGate | PlannedRead) -> list[Any]:
    """The values in the fields' order; ``dataclasses.astuple`` would copy each of them deeply."""
    return list(vars(item).values())
