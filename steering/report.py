"""What steering did to a request: the workers' summaries, joined to the response's ``steering``.

A worker keeps a record while a request runs, and sums it up when it is asked to. The front end
joins the summaries of all pipeline stages into one report for each choice.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from sae.self_check import Measured
from steering.request.edits import Edit
from steering.request.spec import SteeringSpec

#: Figures of an edit or of a hook point, by the names that the response has for them.
Figures = Mapping[str, Any]
#: A position, and the ``[latent, activation]`` pairs that were read there, best first.
FeaturesAt = tuple[int, list[list[float]]]

#: What a choice's ``stop_reason`` is if a condition of ``stop_when`` ended it.
STOP_REASON: Final = "steering"

#: The figures of an edit for which no worker saw a token.
_NOTHING: Figures = {
    "tokens_edited": 0,
    "tokens_skipped": 0,
    "tokens_active": 0,
    "mean_activation": None,
    "max_activation": None,
}


@dataclass(frozen=True)
class Summary:
    """What one worker recorded of one choice. A figure that it did not record is None.

    Attributes:
        child: index of the choice.
        cached: how many tokens of the prompt no pass of this choice computed.
        edits: figures of each edit; None if this worker does not hold the edit's layer.
        edited: figures of each hook point where a token was edited, in the order of the pass.
        stopped: what fired at the last position that counts: ``gate``, the index of a condition in
            `SteeringSpec.gates`, ``position`` and ``activation``.
        read: ``[n]`` int64 positions, ``[n, top_k]`` int32 latents and ``[n, top_k]`` float32
            activations, best first, as bytes.
        aggregate: ``[latent, score]`` of the strongest features over the text, best first.
        measured: the fields of `sae.self_check.Measured`.
        probed: what `steering.worker.study_probes` found for each of a study's probes; None for a
            probe if this worker does not hold its layer.
    """

    child: int
    cached: int | None = None
    edits: Sequence[Figures | None] = ()
    edited: Sequence[Figures] | None = None
    stopped: Figures | None = None
    read: Sequence[bytes] | None = None
    aggregate: list[list[float]] | None = None
    measured: Mapping[str, Any] | None = None
    probed: Sequence[Figures | None] | None = None

    def to_wire(self) -> dict[str, Any]:
        """The summary in plain types, for vLLM's RPC."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Summary:
        """The inverse of `to_wire`; a field that is left out was not recorded."""
        return cls(**wire)


@dataclass(frozen=True)
class Choice:
    """The tokens of one choice.

    Attributes:
        prompt: token ids of vLLM's prompt.
        generated: token ids that were sampled.
        prompt_len: where generation begins, as edits see it.
        cached: prompt tokens from the prefix cache, as vLLM counts them.
        stopped: whether ``stop_when`` ended it.
    """

    prompt: Sequence[int]
    generated: Sequence[int]
    prompt_len: int
    cached: int = 0
    stopped: bool = False

    def token_at(self, position: int) -> int:
        """The token id at a position."""
        start = len(self.prompt)
        return self.prompt[position] if position < start else self.generated[position - start]

    @property
    def entered(self) -> int:
        """How many positions entered the model and count.

        The last token that is returned does not enter it, unless ``stop_when`` ended the choice:
        that token was found to fulfil the condition inside the model.
        """
        unentered = 0 if self.stopped else 1
        return len(self.prompt) + max(len(self.generated) - unentered, 0)


@dataclass(frozen=True)
class Report:
    """What one choice's steering did, in the shapes of a response.

    ``aggregate``, ``measured`` and ``probed`` are for `inspect`, the self-check and studies; they
    are no part of a response's ``steering``.
    """

    interventions: list[dict[str, Any]]
    tokens_cached: int
    read: dict[str, Any] | None = None
    edited: list[dict[str, Any]] | None = None
    protected: dict[str, Any] | None = None
    stopped: dict[str, Any] | None = None
    aggregate: list[list[float]] | None = None
    measured: Measured | None = None
    probed: tuple[Figures | None, ...] = ()

    @classmethod
    def of(
        cls,
        spec: SteeringSpec,
        choice: Choice,
        summaries: Sequence[Summary],
        read: Iterable[FeaturesAt],
        decode: Callable[[list[int]], str],
        protected: Figures | None = None,
    ) -> Report:
        """Join the workers' summaries of one choice.

        Args:
            spec: what the request asked for.
            choice: its tokens.
            summaries: one from each pipeline stage that recorded something, in their order.
            read: what `features_read` makes of the summaries' ``read``.
            decode: turns token ids into text.
            protected: what ``protect`` left of the edits; None if nothing was protected.
        """
        cached = _first(s.cached for s in summaries)
        edited = [dict(figures) for s in summaries for figures in s.edited or ()]
        measured = _first(s.measured for s in summaries)
        return cls(
            interventions=[
                _entry(edit, (s.edits[i] for s in summaries if s.edits))
                for i, edit in enumerate(spec.edits)
            ],
            # vLLM gives one number for all choices of a request, and no new one after a preemption.
            tokens_cached=choice.cached if cached is None else int(cached),
            read=_read(spec, choice, read, decode),
            edited=edited if any(s.edited is not None for s in summaries) else None,
            protected=None if protected is None else dict(protected),
            stopped=_stopped(spec, _first(s.stopped for s in summaries))
            if choice.stopped
            else None,
            aggregate=_first(s.aggregate for s in summaries),
            measured=None if measured is None else Measured(**measured),
            probed=tuple(
                _first(of_stages)
                for of_stages in zip(*(s.probed for s in summaries if s.probed), strict=True)
            ),
        )

    def to_json(self, with_report: bool) -> dict[str, Any]:
        """This choice's part of the response's ``steering``.

        Args:
            with_report: whether the request asked what was edited, and not only for what was read.
        """
        body: dict[str, Any] = {}
        if with_report:
            body["interventions"] = self.interventions
            body["tokens_cached"] = self.tokens_cached
            if self.edited is not None:
                body["edited"] = self.edited
            if self.protected is not None:
                body["protected"] = self.protected
        if self.stopped is not None:
            body["stopped"] = self.stopped
        if self.read is not None:
            body["read"] = self.read
        return body


def response_object(reports: Sequence[Report], with_report: bool) -> dict[str, Any]:
    """A response's ``steering``: its only choice's, or those of several under ``choices``."""
    choices = [report.to_json(with_report) for report in reports]
    if len(choices) == 1:
        return choices[0]
    return {"choices": [{"index": i, **choice} for i, choice in enumerate(choices)]}


class Ticket:
    """The place where the reports of one HTTP request are put until its response takes them.

    The request carries its ticket, so the ticket goes when the request goes, however that ends.

    Args:
        report: whether the response is to say what was edited.
        turns: whether its engine requests are turns of one conversation, as when vLLM calls its
            built-in tools: each reads what those before it wrote, and the last stands for all.
    """

    def __init__(self, report: bool, *, turns: bool = False) -> None:
        #: Names the request among those of other clients, who may choose equal request ids.
        self.id = uuid.uuid4().hex
        self._report = report
        self._turns = turns
        self._reports: list[list[Report]] = []
        self._choices: list[int] = []
        self._streamed: dict[int, list[dict[str, Any]]] = {}

    def expect(self, choices: int = 1) -> int:
        """Reserve a place for the next engine request, in the order of the HTTP request's prompts.

        Args:
            choices: how many choices the engine request has.

        Returns:
            The place, which `put` and `put_streamed` take.
        """
        self._reports.append([])
        self._choices.append(choices)
        return len(self._reports) - 1

    def put(self, place: int, reports: list[Report]) -> None:
        """Store the reports of an engine request's choices."""
        self._reports[place] = reports

    def put_streamed(self, place: int, child: int, read: dict[str, Any]) -> None:
        """Store the part of a choice's read that is known by now; a turn's begins with its prompt.

        Args:
            place: the engine request's, from `expect`.
            child: index of the choice within it.
            read: as `read_object` makes it.
        """
        index = child if self._turns else sum(self._choices[:place]) + child
        self._streamed.setdefault(index, []).append(read)

    def take_streamed(self) -> dict[str, Any] | None:
        """What was read since the last call, as a chunk's ``steering``; None if nothing was."""
        if not self._streamed:
            return None
        streamed, self._streamed = self._streamed, {}
        reads = {
            index: {**parts[0], "tokens": [token for part in parts for token in part["tokens"]]}
            for index, parts in sorted(streamed.items())
        }
        if self._turns or sum(self._choices) == 1:
            return {"read": reads[0]}
        return {"choices": [{"index": index, "read": read} for index, read in reads.items()]}

    @property
    def reports(self) -> list[Report]:
        """All reports so far, in the order of the response's choices."""
        taken = self._reports[-1:] if self._turns else self._reports
        return [report for of_request in taken for report in of_request]

    def to_json(self) -> dict[str, Any]:
        """The response's ``steering``."""
        return response_object(self.reports, self._report)

    def __repr__(self) -> str:
        return f"Ticket({self.id})"


def wants_report(spec: SteeringSpec) -> bool:
    """Whether a response says something about its steering."""
    return spec.report or spec.read is not None or bool(spec.stop_when)


def _entry(edit: Edit, figures: Iterable[Figures | None]) -> dict[str, Any]:
    """One of ``interventions``; each pipeline stage knows the edits at its own layers."""
    known = _first(figures)
    if known is None:
        known = _NOTHING if edit.when is None else {**_NOTHING, "tokens_held_back": 0}
    return {
        "sae": edit.sae,
        "feature": edit.feature,
        "op": edit.op,
        "value": edit.value,
        "effective_value": edit.effective_value,
        **known,
    }


def _stopped(spec: SteeringSpec, figures: Figures | None) -> dict[str, Any] | None:
    if figures is None:
        return None
    condition = spec.gates[figures["gate"]]
    return {
        "sae": condition.sae,
        "feature": condition.feature,
        "position": figures["position"],
        "activation": figures["activation"],
    }


def _read(
    spec: SteeringSpec,
    choice: Choice,
    read: Iterable[FeaturesAt],
    decode: Callable[[list[int]], str],
) -> dict[str, Any] | None:
    if spec.read is None or spec.read.stream:
        return None
    return read_object(spec.read.sae, choice, read, decode)


def read_object(
    sae: str,
    choice: Choice,
    read: Iterable[FeaturesAt],
    decode: Callable[[list[int]], str],
) -> dict[str, Any]:
    """A response's ``read`` of some of a choice's tokens.

    Args:
        sae: name of the SAE that was read.
        choice: the tokens.
        read: the positions, and what was read at each.
        decode: turns token ids into text.
    """
    tokens = [
        {
            "position": position,
            "id": token,
            "text": decode([token]),
            "phase": "prompt" if position < choice.prompt_len else "generation",
            "features": features,
        }
        for position, features in read
        for token in (choice.token_at(position),)
    ]
    return {"sae": sae, "tokens": tokens}


def features_read(read: Sequence[bytes]) -> Iterator[FeaturesAt]:
    """Each position of a summary's ``read`` with its ``[latent, value]`` pairs, best first.

    Values that are not above 0 are left out: they only fill up places if fewer features fired than
    were asked for. So are infinite ones, which JSON cannot hold.
    """
    if not read[0]:
        return
    positions = np.frombuffer(read[0], dtype=np.int64)
    shape = (len(positions), -1)
    latents = np.frombuffer(read[1], dtype=np.int32).reshape(shape)
    values = np.frombuffer(read[2], dtype=np.float32).reshape(shape)
    for position, latents_at, values_at in zip(positions, latents, values, strict=True):
        kept = (values_at > 0) & (values_at < np.inf)
        pairs = zip(latents_at[kept].tolist(), values_at[kept].tolist(), strict=True)
        yield int(position), [list(pair) for pair in pairs]


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)
