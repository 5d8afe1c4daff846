"""The ``steering`` field of a request, resolved and in one canonical form.

This module needs neither torch nor vLLM: the HTTP layer, the cache salt and offline use all share
its types. `steering.request.parse` makes them from JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from steering.errors import SteeringError
from steering.request.conditions import PROMPT, SO_FAR, Condition
from steering.request.edits import Edit
from steering.request.positions import Positions


@dataclass(frozen=True)
class Read:
    """Return the ``top_k`` strongest features of each covered token at one SAE.

    Attributes:
        sae: name of the SAE.
        top_k: how many features of each token.
        stream: whether they come with the chunks of a streamed answer.
    """

    sae: str
    top_k: int
    stream: bool = False


@dataclass(frozen=True)
class SteeringSpec:
    """A whole ``steering`` field, validated against the SAEs that are loaded.

    Attributes:
        edits: the interventions, each with its own positions and conditions.
        positions: the request's own, which a read covers.
        error_term: whether what the SAEs do not explain stays.
        report: whether the response says what was edited.
        read: what is read; None for nothing.
        stop_when: conditions any of which ends the answer.
        reread: whether edits are solved so that the SAE, run again, reads what was asked for.
        protect: (SAE, feature) pairs whose pre-activations the edits must not move.
        max_share: largest share of the stream's norm that a token's whole change at one hook
            point may be; None for no limit.
    """

    edits: tuple[Edit, ...]
    positions: Positions
    error_term: bool
    report: bool
    read: Read | None
    stop_when: tuple[Condition, ...] = ()
    reread: bool = False
    protect: tuple[tuple[str, int], ...] = ()
    max_share: float | None = None

    @property
    def saes(self) -> tuple[str, ...]:
        """Names of the SAEs that this request edits, in order of first use."""
        return tuple(dict.fromkeys(edit.sae for edit in self.edits))

    @property
    def kv_saes(self) -> tuple[str, ...]:
        """Names of the SAEs that decide what the KV cache holds: those of edits and conditions."""
        conditions = (condition.sae for edit in self.edits for condition in _conditions(edit))
        return tuple(dict.fromkeys((*self.saes, *conditions)))

    @property
    def all_saes(self) -> tuple[str, ...]:
        """Names of all SAEs that this request uses."""
        read = () if self.read is None else (self.read.sae,)
        return tuple(dict.fromkeys((*self.kv_saes, *(c.sae for c in self.stop_when), *read)))

    @property
    def gates(self) -> tuple[Condition, ...]:
        """The distinct conditions, those of edits first. A plan names each by its index in this."""
        conditions = (condition for edit in self.edits for condition in _conditions(edit))
        return tuple(dict.fromkeys((*conditions, *self.stop_when)))

    @property
    def phase_dependent(self) -> bool:
        """Whether what happens to a token depends on where the prompt ends.

        Negative positions do not count: `at` turns them into positions from the prompt's start.
        """
        return any(
            edit.positions.prompt != edit.positions.generation
            or any(condition.scope == PROMPT for condition in _conditions(edit))
            for edit in self.edits
            if not edit.positions.empty
        )

    @property
    def skips_prefix_cache(self) -> bool:
        """Whether all of the prompt must be computed: it is read, or it decides on later edits."""
        return self.read is not None or any(
            condition.scope in (SO_FAR, PROMPT)
            for edit in self.edits
            for condition in _conditions(edit)
        )

    @property
    def relative(self) -> bool:
        """Whether some position counts from the prompt's end."""
        every = (self.positions, *(edit.positions for edit in self.edits))
        return any(positions.relative for positions in every)

    def at(self, prompt_len: int) -> SteeringSpec:
        """The same for a prompt of this length: no position is negative any more.

        Raises:
            SteeringError: ``duplicate_intervention`` if two edits of one feature, whose windows
                count from different ends of the prompt, meet in this one.
        """
        if not self.relative:
            return self
        refuse_duplicates(self.edits, lambda a, b: a.meets(b, prompt_len))
        edits = tuple(replace(edit, positions=edit.positions.at(prompt_len)) for edit in self.edits)
        return replace(self, edits=edits, positions=self.positions.at(prompt_len))

    def canonical(self) -> bytes:
        """Bytes that are equal exactly when two specs have the same effective edits.

        The order of edits and conditions, spelled-out defaults, the unit, ``stop_when``,
        ``report`` and ``read`` do not count, nor does an edit that covers nothing.
        """
        edits = sorted(edit.canonical() for edit in self.edits if not edit.positions.empty)
        covering = {edit[0] for edit in edits}
        protect = sorted(pair for pair in self.protect if pair[0] in covering)
        share = self.max_share
        rest = (self.error_term, self.reread, protect, share) if edits else ()
        return json.dumps([edits, *rest], separators=(",", ":")).encode()


def refuse_duplicates(
    edits: Sequence[Edit], overlap: Callable[[Positions, Positions], bool]
) -> None:
    """Raise SteeringError ``duplicate_intervention`` if two edits of one feature overlap."""
    seen: dict[tuple[str, int], list[int]] = {}
    for later, edit in enumerate(edits):
        earlier = seen.setdefault((edit.sae, edit.feature), [])
        for i in earlier:
            if overlap(edits[i].positions, edit.positions):
                raise SteeringError(
                    "duplicate_intervention",
                    f"interventions {i} and {later} both edit feature {edit.feature} of SAE "
                    f"{edit.sae!r} on the same tokens",
                    f"steering.interventions[{later}]",
                )
        earlier.append(later)


def nothing_loaded() -> SteeringError:
    """The refusal of any steering by a server that has no SAE loaded."""
    return SteeringError(
        "steering_unavailable",
        "this server has no SAE loaded, so it cannot steer; start it with --sae NAME=SOURCE",
        "steering",
    )


def _conditions(edit: Edit) -> tuple[Condition, ...]:
    return () if edit.when is None else edit.when.conditions
