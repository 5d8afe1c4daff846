"""What an engine cannot do for a request, the way it is served."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sae.card import HookPoint, SAECard
from steering.errors import SteeringError
from steering.request.spec import SteeringSpec


@dataclass(frozen=True)
class EngineLimits:
    """How an engine is served, as far as requests depend on it.

    Attributes:
        first_layers: the first decoder layer of each pipeline stage, ascending.
        speculates: whether the engine decodes speculatively.
        holds_none: whether it runs on an accelerator that holds no SAE whole, so that each pass
            that needs all of one would copy it there many times, and everybody would wait.
    """

    first_layers: tuple[int, ...] = (0,)
    speculates: bool = False
    holds_none: bool = False

    @property
    def last_stage(self) -> int:
        """Index of the last pipeline stage."""
        return len(self.first_layers) - 1

    def stage_of(self, hook: str) -> int:
        """The pipeline stage that holds a hook point."""
        return bisect_right(self.first_layers, HookPoint.parse(hook).layer) - 1

    def refuse(self, spec: SteeringSpec, card: Callable[[str], SAECard]) -> None:
        """Refuse a request that this engine cannot serve.

        Args:
            spec: the validated field.
            card: gives the card of the SAE of a name.

        Raises:
            SteeringError: ``unsupported_combination`` if ``stop_when`` or a streamed read needs
                what this engine cannot do, or as in `refuse_whole`.
        """

        def reads(name: str) -> str:
            return card(name).reads

        if self.holds_none:
            for name, param in _whole(spec, lambda name: card(name).exact_from_row):
                self.refuse_whole(name, param)
        self._refuse_stop_when(spec, reads)
        if spec.read is not None and spec.read.stream:
            self._refuse_earlier_stage("read.stream", reads(spec.read.sae))

    def refuse_whole(self, name: str, param: str | None) -> None:
        """Refuse what needs all of an SAE, if this engine keeps it away from the accelerator.

        Args:
            name: name of the SAE.
            param: the path that a refusal names.

        Raises:
            SteeringError: ``unsupported_combination`` if `holds_none`.
        """
        if self.holds_none:
            raise SteeringError(
                "unsupported_combination",
                f"this needs all of SAE {name!r}, and this server holds no SAE on the GPU; serve "
                "with --steering-resident turns or all",
                param,
            )

    def _refuse_stop_when(self, spec: SteeringSpec, reads: Callable[[str], str]) -> None:
        if not spec.stop_when:
            return
        if self.speculates:
            raise SteeringError(
                "unsupported_combination",
                "stop_when does not work with speculative decoding, which computes further tokens "
                "before the one that may stop it is read; serve without --speculative-config",
                "steering.stop_when",
            )
        for condition in spec.stop_when:
            self._refuse_earlier_stage("stop_when", reads(condition.sae))

    def _refuse_earlier_stage(self, field: str, hook: str) -> None:
        # Only what the last stage finds comes to the scheduler with the sampled tokens.
        if self.stage_of(hook) != self.last_stage:
            raise SteeringError(
                "unsupported_combination",
                f"{field} reads {hook}, which is not on the last pipeline stage (from layer "
                f"{self.first_layers[-1]} on); serve without pipeline parallelism, or use an SAE "
                "at a later layer",
                f"steering.{field}",
            )


def _whole(spec: SteeringSpec, exact_from_row: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """The SAEs that must encode tokens of this request in full, and where it says so.

    These are the SAEs of `SteeringPlan.encoded`, each with the path that a refusal names.
    """
    if spec.read is not None:
        yield spec.read.sae, "steering.read"
    for i, edit in enumerate(spec.edits):
        if not spec.error_term:
            yield edit.sae, "steering.error_term"
        elif not exact_from_row(edit.sae) and (edit.op != "add" or spec.report):
            yield edit.sae, f"steering.interventions[{i}].sae"
        if edit.when is not None:
            for condition in edit.when.conditions:
                if not exact_from_row(condition.sae):
                    yield condition.sae, edit.when.path
    for condition in spec.stop_when:
        if not exact_from_row(condition.sae):
            yield condition.sae, "steering.stop_when"
