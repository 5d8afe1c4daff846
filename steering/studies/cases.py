"""The texts of an evaluation as its configurations have them, and the tokens that they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from steering.errors import SteeringError
from steering.request.accepted import Accepted
from steering.studies.evaluate_body import Body
from steering.studies.study import Context
from steering.studies.texts import TextBody, within
from steering.vllm.reader import Text

#: Roles of messages in whose place a system message is put.
_SYSTEM: Final = ("system", "developer")
#: Unsteered texts are run again, to see what two runs differ by, up to such a part of all tokens.
_AGAIN: Final = 0.02


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


async def configurations_of(context: Context, body: Body) -> list[Configuration]:
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


async def cases_of(
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


def charge(
    context: Context,
    cases: Sequence[Case],
    configurations: Sequence[Configuration],
    max_tokens: int,
) -> None:
    tokens = 0
    for case in cases:
        completion = _completion(case, max_tokens)
        unsteered = len(case.unsteered.prompt) + completion
        steered = sum(len(prompt) + completion for prompt in case.prompts)
        answers = 0 if case.unsteered.completion else steered
        alone = sum(len(configurations[j].alone) for j in case.configurations)
        tokens += unsteered + steered + answers
        tokens += unsteered * (alone + case.again)
    context.charge(tokens)
