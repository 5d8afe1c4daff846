"""What an engine cannot do for a request, the way it is served."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from sae.card import HookPoint
from steering.errors import SteeringError
from steering.request.spec import SteeringSpec


@dataclass(frozen=True)
class EngineLimits:
    """How an engine is served, as far as requests depend on it.

    Attributes:
        first_layers: the first decoder layer of each pipeline stage, ascending.
        speculates: whether the engine decodes speculatively.
    """

    first_layers: tuple[int, ...] = (0,)
    speculates: bool = False

    @property
    def last_stage(self) -> int:
        """Index of the last pipeline stage."""
        return len(self.first_layers) - 1

    def stage_of(self, hook: str) -> int:
        """The pipeline stage that holds a hook point."""
        return bisect_right(self.first_layers, HookPoint.parse(hook).layer) - 1

    def refuse(self, spec: SteeringSpec, reads: Callable[[str], str]) -> None:
        """Refuse a request that this engine cannot serve.

        Args:
            spec: the validated field.
            reads: tells the hook point at which the SAE of a name is read.

        Raises:
            SteeringError: ``unsupported_combination`` if ``stop_when`` or a streamed read needs
                what this engine cannot do.
        """
        self._refuse_stop_when(spec, reads)
        if spec.read is not None and spec.read.stream:
            self._refuse_earlier_stage("read.stream", reads(spec.read.sae))

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
