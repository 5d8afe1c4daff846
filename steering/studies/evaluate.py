"""What edits, or a system message in their place, do to texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Final

import numpy as np
from pydantic import ConfigDict, Field, Strict, StrictBool, StrictInt, StrictStr

from sae.numbers import finite
from steering.errors import SteeringError
from steering.request.accepted import Accepted
from steering.request.shape import Shape
from steering.studies.body import SteeringValue, StudyBody, parse_body
from steering.studies.changes import Steered, changes, covered_by
from steering.studies.evaluation import Answer as Answer
from steering.studies.evaluation import Evaluated
from steering.studies.scoring import Comparison, Scorer, Side
from steering.studies.study import Context
from steering.studies.texts import TextBody, Texts, within
from steering.vllm.reader import Run, Text

MAX_CONFIGURATIONS: Final = 16
DEFAULT_MAX_TOKENS: Final = 64
DEFAULT_TOP_K: Final = 10
MAX_TOP_K: Final = 1000
#: Roles of messages in whose place a system message is put.
_SYSTEM: Final = ("system", "developer")
#: Unsteered texts are run again, to see what two runs differ by, up to such a part of all tokens.
_AGAIN: Final = 0.05


class ConfigurationBody(Shape):
    """What is tried: an edit, none, or a system message."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringConfiguration")

    name: StrictStr
    steering: SteeringValue = Field(
        default=None,
        description="As in a request; without interventions it is a control. Either this or "
        "`system`.",
    )
    system: StrictStr | None = Field(
        default=None, description="A system message in the place of the text's own."
    )


class FeaturesBody(Shape):
    """An SAE at which texts are read."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringEvaluatedSAE")

    sae: StrictStr | None = Field(default=None, description="May be left out if one is loaded.")
    top_k: Annotated[StrictInt, Field(ge=1, le=MAX_TOP_K)] | None = Field(
        default=None, description=f"Features that moved most (default {DEFAULT_TOP_K})."
    )


_Configurations = Annotated[
    list[ConfigurationBody], Strict(), Field(min_length=1, max_length=MAX_CONFIGURATIONS)
]


class Body(StudyBody):
    """The body of an evaluation."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringEvaluationRequest")

    texts: Texts
    configurations: _Configurations = Field(description="Their names are distinct.")
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None,
        description="Of an answer, which each configuration gives to a text without completion "
        f"(default {DEFAULT_MAX_TOKENS}).",
    )
    features: Annotated[list[FeaturesBody], Strict()] | None = Field(
        default=None, description="SAEs at which the same texts are read, unsteered and steered."
    )
    interactions: StrictBool | None = Field(
        default=None, description="Whether each edit is tried alone as well."
    )
    detail: StrictBool | None = Field(
        default=None, description="Whether figures of every token are returned."
    )


@dataclass(frozen=True)
class Configuration:
    """One that is tried.

    Attributes:
        name: the client's.
        accepted: the edit, with a report; None for a control and for a system message.
        system: the system message; None if there is none.
        alone: each of several edits by itself, if that was asked for.
    """

    name: str
    accepted: Accepted | None = None
    system: str | None = None
    alone: tuple[Accepted, ...] = ()

    @property
    def control(self) -> bool:
        return self.accepted is None and self.system is None


@dataclass(frozen=True)
class Case:
    """One completion of a text, beside which configurations are compared with the model as it is.

    Attributes:
        text: its place.
        configurations: places of those that are compared: all of them on a completion that was
            given, one on an answer of its own.
        unsteered: prompt and completion without any.
        prompts: of each configuration.
        again: whether the unsteered text is run twice.
    """

    text: int
    configurations: tuple[int, ...]
    unsteered: Text
    prompts: tuple[tuple[int, ...], ...]
    again: bool = False

    @property
    def texts(self) -> list[Text]:
        """The text of each configuration."""
        return [Text(prompt, self.unsteered.completion) for prompt in self.prompts]


async def evaluate(context: Context, body: object) -> dict[str, Any]:
    """POST /v1/steering/evaluate.

    Args:
        context: this study's own.
        body: the JSON value of the body.

    Raises:
        SteeringError: with the code and the path of what is wrong.
    """
    asked = parse_body(Body, body)
    configurations = await _configurations(context, asked)
    saes = await _saes(context, asked)
    max_tokens = asked.max_tokens or DEFAULT_MAX_TOKENS
    cases = await _cases(context, asked, configurations, max_tokens)
    _charge(context, cases, configurations, max_tokens, bool(saes))
    found = [
        Evaluated(one.name, alone=[] if asked.interactions and one.system is None else None)
        for one in configurations
    ]
    _expect(context, cases, configurations, bool(saes))
    cases = await _answered(context, cases, configurations, max_tokens, found)
    noise = await _compare(context, cases, configurations, found)
    if saes:
        await _read(
            context, cases, configurations, list(dict.fromkeys(name for name, _ in saes)), found
        )
    decode = context.vocabulary.decode if asked.detail else None
    return {
        "object": "steering.evaluation",
        "noise": {"kl": noise},
        "configurations": [
            one.to_json(len(asked.texts), _features(context, one, saes), decode) for one in found
        ],
    }


async def _configurations(context: Context, body: Body) -> list[Configuration]:
    made: list[Configuration] = []
    for i, one in enumerate(body.configurations):
        path = f"configurations[{i}]"
        if not one.name or one.name in {other.name for other in made}:
            fault = "is the name of an earlier one" if one.name else "is no name"
            raise SteeringError(
                "invalid_value", f"{one.name[:80]!r} {fault}: names are distinct", f"{path}.name"
            )
        if (one.steering is None) == (one.system is None):
            name = "steering" if one.system is None else "system"
            raise SteeringError(
                "invalid_value",
                "a configuration needs either steering or system",
                f"{path}.{name}",
            )
        if one.steering is None:
            made.append(Configuration(one.name, system=one.system))
            continue
        path = f"{path}.steering"
        accepted = await context.accept(one.steering, path, report=True, empty_allowed=True)
        if not accepted.spec.edits:
            made.append(Configuration(one.name))
            continue
        several = body.interactions and len(accepted.spec.edits) > 1
        alone = await _alone(context, accepted, path) if several else ()
        made.append(Configuration(one.name, accepted, alone=alone))
    return made


async def _alone(context: Context, accepted: Accepted, path: str) -> tuple[Accepted, ...]:
    """Each edit by itself, beside what is protected of its own SAE."""
    spec, made = accepted.spec, []
    for edit in spec.edits:
        protect = tuple(pair for pair in spec.protect if pair[0] == edit.sae)
        one = replace(spec, edits=(edit,), protect=protect, report=False)
        try:
            made.append(Accepted(one, await context.catalog.prepare(one)))
        except SteeringError as error:
            raise SteeringError(error.code, error.message, path) from None
    return tuple(made)


async def _saes(context: Context, body: Body) -> list[tuple[str, int]]:
    """Names of the SAEs at which texts are read, and how many features of each are told."""
    found = []
    for i, one in enumerate(body.features or ()):
        name = context.sae(one.sae, f"features[{i}]")
        await context.catalog.prepare_whole(name, f"features[{i}].sae")
        found.append((name, one.top_k or DEFAULT_TOP_K))
    return found


async def _cases(
    context: Context, body: Body, configurations: Sequence[Configuration], max_tokens: int
) -> list[Case]:
    """Texts with completions as they are; the others without, one for each configuration."""
    made = []
    every = tuple(range(len(configurations)))
    for i, text in enumerate(body.texts):
        path = f"texts[{i}]"
        answered = text.completion is None
        if answered and body.interactions:
            raise SteeringError(
                "invalid_value",
                "with interactions, every text needs a completion",
                f"{path}.completion",
            )
        room = max_tokens if answered else 0
        own = await context.tokens(text, path, room=room, answered=True)
        prompts = []
        for j, one in enumerate(configurations):
            prompt = own.prompt
            if one.system is not None:
                where = f"configurations[{j}].system"
                prompt = await _with_system(context, text, one.system, room, path, where)
            prompts.append(prompt)
        if answered:
            made += [Case(i, (j,), own, (prompts[j],)) for j in every]
        else:
            made.append(Case(i, every, own, tuple(prompts)))
    if any(one.control for one in configurations):
        return made
    return _again(made, len(configurations), max_tokens)


async def _with_system(
    context: Context, text: TextBody, system: str, room: int, path: str, where: str
) -> tuple[int, ...]:
    """A text's prompt with another system message, or with one."""
    if text.messages is None:
        raise SteeringError(
            "invalid_value",
            f"a system message ({where}) needs a text of messages, this one has a prompt",
            within(path, "prompt"),
        )
    others = [message for message in text.messages if message.get("role") not in _SYSTEM]
    messages = [{"role": "system", "content": system}, *others]
    try:
        changed = text.model_copy(update={"messages": messages})
        return (await context.tokens(changed, path, room=room, answered=True)).prompt
    except SteeringError as error:
        raise SteeringError(error.code, error.message, where) from None


def _again(cases: list[Case], num_configurations: int, max_tokens: int) -> list[Case]:
    """The same, the shortest of them to be run twice: at least one."""
    lengths = [len(case.unsteered.prompt) + _completion(case, max_tokens) for case in cases]
    left = _AGAIN * sum(
        length * (len(case.configurations) + 1) for case, length in zip(cases, lengths, strict=True)
    )
    made = list(cases)
    for count, place in enumerate(np.argsort(lengths, kind="stable").tolist()):
        left -= lengths[place]
        if count and left < 0:
            break
        made[place] = replace(made[place], again=True)
    return made


def _completion(case: Case, max_tokens: int) -> int:
    """Tokens of its completion, or the most that an answer may have."""
    return len(case.unsteered.completion) or max_tokens


def _charge(
    context: Context,
    cases: Sequence[Case],
    configurations: Sequence[Configuration],
    max_tokens: int,
    reads: bool,
) -> None:
    tokens = 0
    for case in cases:
        completion = _completion(case, max_tokens)
        unsteered = len(case.unsteered.prompt) + completion
        steered = sum(len(prompt) + completion for prompt in case.prompts)
        answers = 0 if case.unsteered.completion else steered
        alone = sum(len(configurations[j].alone) for j in case.configurations)
        tokens += (unsteered + steered) * (1 + reads) + answers
        tokens += unsteered * (alone + case.again)
    context.charge(tokens, "texts")


def _expect(
    context: Context,
    cases: Sequence[Case],
    configurations: Sequence[Configuration],
    reads: bool,
) -> None:
    steps = 0
    for case in cases:
        tried = len(case.configurations)
        alone = sum(len(configurations[j].alone) for j in case.configurations)
        answers = 0 if case.unsteered.completion else tried
        steps += answers + tried * (1 + reads) + alone + case.again
    context.progress.expect(steps)


async def _answered(
    context: Context,
    cases: Sequence[Case],
    configurations: Sequence[Configuration],
    max_tokens: int,
    found: Sequence[Evaluated],
) -> list[Case]:
    """The cases with the answers that configurations give to texts without completion."""
    made = list(cases)
    places = [i for i, case in enumerate(cases) if not case.unsteered.completion]

    def runs() -> Iterator[Run]:
        for i in places:
            accepted = configurations[cases[i].configurations[0]].accepted
            if accepted is not None:
                accepted = replace(accepted, spec=replace(accepted.spec, report=False))
            yield Run.of(Text(cases[i].prompts[0]), accepted, max_tokens=max_tokens)

    async with aclosing(context.reader.each(runs())) as finished:
        async for number, one in finished:
            i = places[number]
            case = made[i]
            choice = one.output.outputs[0]
            ids = tuple(choice.token_ids)
            made[i] = replace(case, unsteered=Text(case.unsteered.prompt, ids))
            # What ended it is no part of its text.
            shown = ids[:-1] if choice.finish_reason == "stop" else ids
            answers = found[case.configurations[0]].answers
            answers[case.text] = context.vocabulary.decode(shown)
            context.progress.step()
    return made


async def _compare(
    context: Context,
    cases: Sequence[Case],
    configurations: Sequence[Configuration],
    found: Sequence[Evaluated],
) -> float | None:
    """Fill in the figures; mean KL of unsteered runs against each other."""
    comparisons, roles = [], []
    for case in cases:
        sides: list[Side] = []
        of_sides: list[tuple[int, int | None] | None] = []  # configuration and edit; None: again
        for j, text in zip(case.configurations, case.texts, strict=True):
            one = configurations[j]
            sides.append(Side(text.prompt, text.completion, one.accepted))
            of_sides.append((j, None))
            for edit, accepted in enumerate(one.alone):
                sides.append(Side(text.prompt, text.completion, accepted))
                of_sides.append((j, edit))
        own = Side(case.unsteered.prompt, case.unsteered.completion)
        if case.again:
            sides.append(own)
            of_sides.append(None)
        comparisons.append(Comparison(own, [(side, ()) for side in sides]))
        roles.append(of_sides)
    noise = []
    async with aclosing(Scorer(context.reader).compare_all(comparisons)) as compared:
        async for i, side, figures in compared:
            case, role = cases[i], roles[i][side]
            if role is None:
                noise.append(figures.kl)
            else:
                found[role[0]].put(case.text, role[1], case.unsteered.completion, figures)
                if configurations[role[0]].control:
                    noise.append(figures.kl)
            context.progress.step()
    return finite(float(np.concatenate(noise).mean()))


async def _read(
    context: Context,
    cases: Sequence[Case],
    configurations: Sequence[Configuration],
    saes: Sequence[str],
    found: Sequence[Evaluated],
) -> None:
    """Read the same texts at SAEs, unsteered and steered."""
    texts = []
    for case in cases:
        steered = []
        for j, text in zip(case.configurations, case.texts, strict=True):
            accepted = configurations[j].accepted
            spec = None if accepted is None else accepted.spec
            steered.append(Steered(text, covered_by(spec), accepted))
        texts.append((case.unsteered, steered))
    read = changes(context.reader, context.catalog, texts, saes)
    async with aclosing(read) as changed:
        async for i, side, of_saes in changed:
            found[cases[i].configurations[side]].add_changes(of_saes)
            context.progress.step()


def _features(
    context: Context, evaluated: Evaluated, saes: Sequence[tuple[str, int]]
) -> list[dict[str, Any]]:
    return [
        evaluated.changes[name].to_json(top_k, context.catalog.features(name).label)
        for name, top_k in saes
    ]
