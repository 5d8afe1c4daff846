"""The figures of an evaluation, put together over texts, as the answer has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sae.arrays import DoubleArray
from sae.numbers import finite
from steering.report import Report
from steering.studies.changes import Changes
from steering.studies.figures import Figures


class KL(BaseModel):
    """KL(unsteered || steered) over all scored positions, in nats."""

    mean: float | None
    max: float | None
    sum: float | None


class Mean(BaseModel):
    """A mean over all scored positions."""

    mean: float | None


class NLL(BaseModel):
    """Mean of -log p of the actual tokens, in nats."""

    unsteered: float | None
    steered: float | None


class Share(BaseModel):
    """The change's share of the stream's norm, over covered tokens and hook points."""

    mean: float | None
    max: float | None


class FeatureChange(BaseModel):
    """Mean activation of a feature over the covered tokens, unsteered and steered."""

    feature: int
    before: float
    after: float


class MovedFeature(FeatureChange):
    """A feature that no edit names."""

    label: str | None


class FeatureChanges(BaseModel):
    """How an SAE's features differ between the unsteered and the steered texts."""

    sae: str
    edited: list[FeatureChange]
    moved: list[MovedFeature]
    newly_active: float = Field(
        description="How many features that are not edited fire at a token only when steered."
    )
    silenced: float = Field(
        description="How many features that are not edited fire at a token only when unsteered."
    )
    leak: float | None = Field(
        description="Norm of the change of features not edited / norm of the change asked for."
    )
    explained: float | None = Field(
        description="Share of the stream's squared change that the features' change decodes to."
    )


class Alone(BaseModel):
    """What one edit does by itself."""

    sae: str
    feature: int
    nll: float | None = Field(description="By how much it raises nll.")


class Interactions(BaseModel):
    """Whether edits add up: what each does alone, beside what all do together."""

    alone: list[Alone]
    additivity: float | None = Field(
        description="|rise of nll together - sum of rises alone| / sum of |rises alone|."
    )


class Token(BaseModel):
    """A scored token, its KL, and its log-probabilities, in nats."""

    id: int
    text: str
    kl: float | None
    unsteered: float | None
    steered: float | None


class TextDetail(BaseModel):
    """The scored tokens of a text."""

    tokens: list[Token]


class ConfigurationAnswer(BaseModel):
    """What one configuration does."""

    name: str
    tokens: int = Field(description="Scored positions of all texts.")
    kl: KL
    reverse_kl: Mean
    nll: NLL
    top1_agreement: float | None
    share: Share | None
    edits: list[dict[str, Any]] = Field(description="As in a report, of all texts.")
    features: list[FeatureChanges]
    answers: list[str | None]
    interactions: Interactions | None
    detail: list[TextDetail] | None


class Answer(BaseModel):
    """The answer of an evaluation."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringEvaluation")

    object: str = "steering.evaluation"
    noise: dict[str, float | None] = Field(
        description="kl: mean KL of two unsteered runs of a text."
    )
    configurations: list[ConfigurationAnswer]


@dataclass
class Evaluated:
    """What is found about one configuration, by the text's index.

    Attributes:
        name: the client's name for it.
        alone: log-probabilities with each of several edits alone, by edit and text; None if
            interactions are not wanted.
        figures: the figures of each text's scored tokens.
        ids: the scored tokens of each text.
        answers: the configuration's own answer to each text that has no completion.
        changes: the changes at each SAE asked for, by name, over all texts.
    """

    name: str
    alone: list[dict[int, DoubleArray]] | None = None
    figures: dict[int, Figures] = field(default_factory=dict)
    ids: dict[int, tuple[int, ...]] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)
    changes: dict[str, Changes] = field(default_factory=dict)

    def put(self, text: int, edit: int | None, ids: tuple[int, ...], figures: Figures) -> None:
        """Take the figures of one text.

        Args:
            text: index of the text.
            edit: index of the edit that was made alone; None if all were made together.
            ids: the scored tokens.
            figures: what was found for them.
        """
        if edit is None:
            self.figures[text], self.ids[text] = figures, ids
            return
        assert self.alone is not None
        while len(self.alone) <= edit:
            self.alone.append({})
        self.alone[edit][text] = figures.steered

    def add_changes(self, found: Iterable[Changes]) -> None:
        """Take the changes of one more text, at each SAE."""
        for changes in found:
            known = self.changes.get(changes.sae)
            self.changes[changes.sae] = changes if known is None else known + changes

    def to_json(
        self,
        num_texts: int,
        features: Sequence[dict[str, Any]],
        writes: Callable[[str], Sequence[str]],
        decode: Callable[[Sequence[int]], str] | None,
    ) -> dict[str, Any]:
        """An entry of ``configurations``.

        Args:
            num_texts: how many texts there are.
            features: the entry of each SAE asked for; see `Changes.to_json`.
            writes: see `share_of`.
            decode: turns token ids into text; None if details are not wanted.
        """
        figures = [self.figures[i] for i in range(num_texts)]
        kl = _all(figures, "kl")
        same = _all(figures, "top_unsteered") == _all(figures, "top_steered")
        reports = [of_text.report for of_text in figures if of_text.report is not None]
        edits = edits_of(reports)
        return {
            "name": self.name,
            "tokens": len(kl),
            "kl": {"mean": _mean(kl), "max": finite(float(kl.max())), "sum": _sum(kl)},
            "reverse_kl": {"mean": _mean(_all(figures, "reverse_kl"))},
            "nll": {name: _mean(-_all(figures, name)) for name in ("unsteered", "steered")},
            "top1_agreement": _mean(same),
            "share": share_of(reports, writes),
            "edits": edits,
            "features": list(features),
            "answers": [self.answers.get(i) for i in range(num_texts)],
            "interactions": None if self.alone is None else self._interactions(edits, figures),
            "detail": None
            if decode is None
            else [self._detail(i, decode) for i in range(num_texts)],
        }

    def _interactions(
        self, edits: Sequence[Mapping[str, Any]], figures: Sequence[Figures]
    ) -> dict[str, Any]:
        unsteered = _all(figures, "unsteered")
        together = float((unsteered - _all(figures, "steered")).mean())
        if len(edits) == 1:
            rises = [together]
        else:
            places = range(len(figures))
            rises = [
                float((unsteered - np.concatenate([of_edit[i] for i in places])).mean())
                for of_edit in self.alone or ()
            ]
        size = sum(map(abs, rises))
        return {
            "alone": [
                {"sae": edit["sae"], "feature": edit["feature"], "nll": finite(rise)}
                for edit, rise in zip(edits, rises, strict=True)
            ],
            "additivity": finite(abs(together - sum(rises)) / size) if size > 0 else None,
        }

    def _detail(self, text: int, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
        figures = self.figures[text]
        columns = zip(
            self.ids[text],
            *(getattr(figures, name).tolist() for name in ("kl", "unsteered", "steered")),
            strict=True,
        )
        return {
            "tokens": [
                {
                    "id": token,
                    "text": decode([token]),
                    "kl": finite(kl),
                    "unsteered": finite(unsteered),
                    "steered": finite(steered),
                }
                for token, kl, unsteered, steered in columns
            ]
        }


def share_of(
    reports: Sequence[Report], writes: Callable[[str], Sequence[str]]
) -> dict[str, float | None] | None:
    """Mean and largest share over all covered tokens and hook points; None if there are none.

    A token that a condition held back is covered, and its share is 0.

    Args:
        reports: the reports of one spec, one of each text.
        writes: tells the hook points where an SAE's edits are made.
    """
    covered = sum(_covered(report, writes) for report in reports)
    if not covered:
        return None
    hooks = [hook for report in reports for hook in report.edited or ()]
    if any(hook["mean_share"] is None or hook["max_share"] is None for hook in hooks):
        return {"mean": None, "max": None}  # a stream left its dtype's range
    total = sum(hook["tokens"] * hook["mean_share"] for hook in hooks)
    largest = max((hook["max_share"] for hook in hooks), default=0.0)
    return {"mean": finite(total / covered), "max": finite(largest)}


def _covered(report: Report, writes: Callable[[str], Sequence[str]]) -> int:
    """How many tokens edits cover, in a sum over hook points.

    A report counts the tokens that some edit changes at a hook point, and for each edit those that
    a condition held back. If the windows of several edits overlap in part, tokens that all of them
    held back may be missed.
    """
    at_hook = {hook["hook"]: hook["tokens"] for hook in report.edited or ()}
    for entry in report.interventions:
        of_edit = entry["tokens_edited"] + entry.get("tokens_held_back", 0)
        for hook in writes(entry["sae"]):
            at_hook[hook] = max(at_hook.get(hook, 0), of_edit)
    return sum(at_hook.values())


def edits_of(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """The entries of ``interventions`` over all reports of one spec."""
    return [
        _joined(entries)
        for entries in zip(*(report.interventions for report in reports), strict=True)
    ]


def _joined(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    joined = dict(entries[0])
    for name in joined:
        if name.startswith("tokens_"):
            joined[name] = sum(entry[name] for entry in entries)
    edited = [entry for entry in entries if entry["tokens_edited"]]
    joined["mean_activation"] = joined["max_activation"] = None
    # They are None if the stream left its dtype's range.
    if edited and all(entry["mean_activation"] is not None for entry in edited):
        total = sum(entry["tokens_edited"] * entry["mean_activation"] for entry in edited)
        joined["mean_activation"] = total / joined["tokens_edited"]
    if edited and all(entry["max_activation"] is not None for entry in edited):
        joined["max_activation"] = max(entry["max_activation"] for entry in edited)
    return joined


def _all(figures: Sequence[Figures], name: str) -> Any:
    return np.concatenate([getattr(of_text, name) for of_text in figures])


def _mean(values: Any) -> float | None:
    return finite(float(values.mean()))


def _sum(values: Any) -> float | None:
    return finite(float(values.sum()))
