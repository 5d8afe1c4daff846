"""How an SAE's features differ between two runs of a text, unsteered and steered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sae.arrays import DoubleArray
from steering.request.catalog import Catalog
from steering.request.probe import COMPLETION_TOKENS, Tokens
from steering.request.spec import SteeringSpec
from steering.studies.kept_runs import KeptRun
from steering.studies.study import Reader

#: Tokens that one call of the workers compares; served traffic waits for the call to end.
MAX_CALL_TOKENS: Final = 2**10


@dataclass(frozen=True)
class Changes:
    """One SAE's features, in sums over the tokens that were compared.

    Attributes:
        sae: name of the SAE.
        edited: its features that were edited.
        tokens: how many tokens were compared.
        before: ``[d_sae]`` activations in the unsteered run.
        after: ``[d_sae]`` activations in the steered run, after the edits.
        newly_active: how often a feature that is not edited fires in the steered run alone.
        silenced: how often such a feature fires in the unsteered run alone.
        others: squared norm of the change of the features that are not edited.
        asked: squared norm of the change that the edits of this SAE ask for, f' - f.
        stream: squared norm of the stream's change; None if the SAE writes elsewhere than it reads.
        unexplained: squared norm of the stream's change less the decoded change of all features;
            None as ``stream`` is.
    """

    sae: str
    edited: tuple[int, ...]
    tokens: int
    before: DoubleArray
    after: DoubleArray
    newly_active: int = 0
    silenced: int = 0
    others: float = 0.0
    asked: float = 0.0
    stream: float | None = None
    unexplained: float | None = None

    @classmethod
    def none(cls, sae: str, edited: tuple[int, ...], d_sae: int) -> Changes:
        """The changes over no token."""
        return cls(sae, edited, 0, np.zeros(d_sae), np.zeros(d_sae))

    def plus(self, figures: Mapping[str, Any]) -> Changes:
        """The changes over these tokens and others.

        Args:
            figures: what `steering.worker.changes.compare` found for the others.
        """
        latents = np.frombuffer(figures["latents"], np.int32)

        def dense(name: str) -> DoubleArray:
            found = np.zeros(len(self.before))
            found[latents] = np.frombuffer(figures[name], np.float64)
            return found

        return self + Changes(
            self.sae,
            self.edited,
            figures["tokens"],
            dense("before"),
            dense("after"),
            figures["newly_active"],
            figures["silenced"],
            figures["others"],
            figures["asked"],
            figures["stream"],
            figures["unexplained"],
        )

    def __add__(self, other: Changes) -> Changes:
        """The changes over the tokens of both, for the same SAE and edits."""
        return Changes(
            self.sae,
            self.edited,
            self.tokens + other.tokens,
            self.before + other.before,
            self.after + other.after,
            self.newly_active + other.newly_active,
            self.silenced + other.silenced,
            self.others + other.others,
            self.asked + other.asked,
            _sum(self.stream, other.stream),
            _sum(self.unexplained, other.unexplained),
        )

    def to_json(self, top_k: int, label: Callable[[int], str | None]) -> dict[str, Any]:
        """An entry of an evaluation's ``features``; figures that are not defined are null.

        ``leak`` is the norm of the others' change over that of the change asked for, and
        ``explained`` is 1 - |stream's change - decoded change|^2 / |stream's change|^2, both over
        all tokens together.

        Args:
            top_k: how many features ``moved`` may have; only features that moved are in it.
            label: tells the label of a feature.
        """
        n = max(self.tokens, 1)
        before, after = self.before / n, self.after / n
        return {
            "sae": self.sae,
            "edited": [
                {"feature": i, "before": float(before[i]), "after": float(after[i])}
                for i in self.edited
            ],
            "moved": [
                {
                    "feature": i,
                    "label": label(i),
                    "before": float(before[i]),
                    "after": float(after[i]),
                }
                for i in self._moved(top_k)
            ],
            "newly_active": self.newly_active / n,
            "silenced": self.silenced / n,
            "leak": self._leak(),
            "explained": self._explained(),
        }

    def _moved(self, top_k: int) -> list[int]:
        """The features that changed and are not edited, by size of the change, then by index."""
        size = np.abs(self.after - self.before)
        size[list(self.edited)] = 0
        best = np.argsort(-size, kind="stable")[:top_k]
        return [int(i) for i in best if size[i] > 0]

    def _leak(self) -> float | None:
        return _ratio(math.sqrt(self.others), math.sqrt(self.asked)) if self.edited else None

    def _explained(self) -> float | None:
        if self.stream is None or self.unexplained is None:
            return None
        left = _ratio(self.unexplained, self.stream)
        return None if left is None else 1 - left


def covered_by(spec: SteeringSpec | None) -> Tokens:
    """The tokens that some edit covers; those of the completion if there is no edit."""
    if spec is None or not spec.edits:
        return COMPLETION_TOKENS
    return tuple(dict.fromkeys(edit.positions for edit in spec.edits))


async def compared_features(
    reader: Reader, catalog: Catalog, unsteered: KeptRun, run: KeptRun, forget: Sequence[str]
) -> tuple[Changes, ...]:
    """The changes between two runs of a text on one engine, at each SAE whose stream was kept.

    Args:
        reader: asks the workers.
        catalog: the SAEs.
        unsteered: the unsteered run; its stream was kept at these SAEs, for all tokens on which the
            other run is compared.
        run: the steered run.
        forget: keys that the workers forget after the comparison.

    Raises:
        RuntimeError: if the workers lack the stream of some token.
    """
    spec = None if run.accepted is None else run.accepted.spec
    index = [catalog.index[name] for name in run.saes]
    found = [Changes.none(name, _edited(spec, name), catalog.card(name).d_sae) for name in run.saes]
    assert run.report is not None
    total = max((probe["kept"] for probe in run.report.probed if probe is not None), default=0)
    for start in range(0, max(total, 1), MAX_CALL_TOKENS):
        stop = start + MAX_CALL_TOKENS
        answers = await reader.ask(
            run.engine,
            "steering_compare_features",
            *(unsteered.key, run.key, index, start, stop),
            forget if stop >= total else [],
        )
        if not total:
            break
        for i, of_stages in enumerate(zip(*(a for a in answers if a is not None), strict=True)):
            figures = next((figures for figures in of_stages if figures is not None), None)
            if figures is None or figures["unmatched"]:
                raise RuntimeError("the workers lack the stream of some tokens of a text")
            found[i] = found[i].plus(figures)
    return tuple(found)


def _edited(spec: SteeringSpec | None, sae: str) -> tuple[int, ...]:
    edits = () if spec is None else spec.edits
    return tuple(dict.fromkeys(edit.feature for edit in edits if edit.sae == sae))


def _sum(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else a + b


def _ratio(part: float, whole: float) -> float | None:
    """None if the ratio is not defined: nothing changed, or a square left its dtype's range."""
    ratio = part / whole if 0 < whole < math.inf else math.nan
    return ratio if math.isfinite(ratio) else None
