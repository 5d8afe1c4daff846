"""What one feature is near to and what it writes: computed when asked for, then remembered."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Final

from sae.neighbours import interference, nearest
from sae.sae import SAE
from steering.unembedding import Unembedding

#: Neighbours, interferers, promoted and suppressed tokens shown of a feature.
NUM_SHOWN: Final = 10
#: Features remembered; each is four short lists.
MAX_REMEMBERED: Final = 4096

Details = dict[str, Any]


class FeatureDetails:
    """Neighbours by decoder cosine, interferers by encoder, and tokens by the logit lens.

    One thread of its own does the work, from memory-mapped weights and a bounded part at a time:
    it is never in the way of the event loop, and two requests never compete for the disk.
    """

    def __init__(self, unembedding: Callable[[], Unembedding | None]) -> None:
        self._open_unembedding = unembedding
        self._unembedding: Unembedding | None = None
        self._opened = False
        self._opening = Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feature-details")
        self._remembered: OrderedDict[tuple[str, int], Details] = OrderedDict()

    async def get(self, sae: SAE, feature: int) -> Details:
        """What a feature is near to, what it moves, and which tokens it writes.

        `nearest` is [[feature, cosine]], `self_gain` a number, `interferers` [[feature, change]],
        `promoted` and `suppressed` [[token, score]]. The latter two are empty if the model's
        checkpoint does not show its unembedding or, for an SAE of attention's heads, what the
        heads write into the stream. If the SAE reads another width than it writes, `self_gain` is
        None and `interferers` empty.

        Raises:
            IndexError: if the feature is not in [0, d_sae).
        """
        key = (sae.card.id, feature)
        if key not in self._remembered:
            loop = asyncio.get_running_loop()
            details = await loop.run_in_executor(self._thread, self._compute, sae, feature)
            self._remembered[key] = details
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return self._remembered[key]

    def unembedding(self) -> Unembedding | None:
        """The model's, opened when it is first asked for; None if its checkpoint does not show it.

        May be called from any thread.
        """
        with self._opening:
            if not self._opened:
                self._unembedding, self._opened = self._open_unembedding(), True
        return self._unembedding

    def _compute(self, sae: SAE, feature: int) -> Details:
        unembedding = self.unembedding()
        promoted: list[list[Any]] = []
        suppressed: list[list[Any]] = []
        if unembedding is not None:
            rows = unembedding.in_stream(sae.written_by([feature]), sae.card.hook)
            if rows is not None:
                promoted, suppressed = unembedding.strongest(rows[0], NUM_SHOWN)
        self_gain, interferers = interference(sae, feature, NUM_SHOWN)
        return {
            "self_gain": self_gain,
            "interferers": [list(pair) for pair in interferers],
            "nearest": [list(pair) for pair in nearest(sae, feature, NUM_SHOWN)],
            "promoted": promoted,
            "suppressed": suppressed,
        }
