"""At which hook points something is done: for one request, and in the pass under way.

Most hook points are idle in most passes. Between two of them a layer's weights go through the
caches, so whatever a hook point looks at to find that out must come from memory again. It is
therefore found out once for each batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from sae.arrays import IntArray
from steering.request.plan import SteeringPlan
from steering.worker.site import Site
from steering.worker.step import Step


class HooksAtWork:
    """The hook points of one worker at which something is done.

    Args:
        hooks: all of the worker's hook points, by name.

    Attributes:
        in_pass: names of those at which the pass under way does something; empty outside of passes.
    """

    def __init__(self, hooks: Mapping[str, Site]) -> None:
        self._hooks = hooks
        self._sites_of: dict[int, set[str]] = {}
        for hook, site in hooks.items():
            for sae in {*site.saes, *site.written}:
                self._sites_of.setdefault(sae, set()).add(hook)
        self.in_pass: frozenset[str] = frozenset()
        # The slots of the batch as it was laid out last, and where something is done for it.
        self._laid_out: tuple[IntArray, frozenset[str]] | None = None

    def of(self, plan: SteeringPlan) -> list[Site]:
        """The hook points at which something may be done for a request."""
        names = set[str]().union(*(self._sites_of.get(sae, ()) for sae in plan.saes))
        return [self._hooks[hook] for hook in names]

    def forget(self) -> None:
        """The work of some slot has changed."""
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
