"""At which hook points something is done: for one request, and in the pass under way.

Most are idle in most passes. Between two of them a layer's weights go through the caches, so that
all that is looked at to find that out comes from memory; it is found out once a batch instead.
"""

from __future__ import annotations

from collections.abc import Mapping

from sae.arrays import IntArray
from steering.request.plan import SteeringPlan
from steering.worker.site import Site
from steering.worker.step import Step


class HooksAtWork:
    """Those of one worker.

    Args:
        hooks: all of the worker's hook points.

    Attributes:
        in_pass: where something is done in the pass under way; none outside of passes.
    """

    def __init__(self, hooks: Mapping[str, Site]) -> None:
        self._hooks = hooks
        self._sites_of: dict[int, set[str]] = {}
        for hook, site in hooks.items():
            for sae in {*site.saes, *site.written}:
                self._sites_of.setdefault(sae, set()).add(hook)
        self.in_pass: frozenset[str] = frozenset()
        # Where something is done in the batch as it was laid out last, with its slots.
        self._laid_out: tuple[IntArray, frozenset[str]] | None = None

    def of(self, plan: SteeringPlan) -> list[Site]:
        """Where a request may have something done."""
        names = set[str]().union(*(self._sites_of.get(sae, ()) for sae in plan.saes))
        return [self._hooks[hook] for hook in names]

    def forget(self) -> None:
        """What some slot has done has changed."""
        self._laid_out = None

    def begin(self, step: Step) -> None:
        """A pass is laid out."""
        if not step.active:
            self.in_pass = frozenset()
            return
        if self._laid_out is None or self._laid_out[0] is not step.slots_np:
            working = frozenset(hook for hook, site in self._hooks.items() if site.works(step))
            self._laid_out = step.slots_np, working
        self.in_pass = self._laid_out[1]

    def end(self) -> None:
        """The pass is over."""
        self.in_pass = frozenset()
