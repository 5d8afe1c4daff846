"""The texts of an evaluation as each configuration has them, and how many tokens they need."""

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

#: Roles of messages that a configuration's system message replaces.
_SYSTEM: Final = ("system", "developer")
#: Unsteered texts are run again up to this share of all tokens, to see by how much two runs differ.
_AGAIN: Final = 0.02


@dataclass(frozen=True)
class Configuration:
    """One configuration of an evaluation: an edit, a system message, or neither (a control).

    Attributes:
        name: the client's name for it.
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
        """Whether it changes nothing."""
        return self.accepted is None and self.system is None


@dataclass(frozen=True)
class Case:
    """One completion of a text, on which configurations are compared with the model as it is.

    Attributes:
        text: index of the text in the body.
        configurations: indices of the configurations that are compared: all of them on a completion
            that the body gives, only its own on an answer that a configuration gave.
        unsteered: prompt and completion without any configuration.
        prompts: the prompt of each of ``configurations``.
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
    """The configurations of a body, validated.

    Raises:
        SteeringError: ``invalid_value`` for an empty name or one that two have, and for both or
            neither of `steering` and `system`; as `Context.accept` for an edit.
    """
    made: list[Configuration] = []
    for i, item in enumerate(body.configurations):
        path = f"configurations[{i}]"
        if not item.name or item.name in {other.name for other in made}:
            fault = "is the name of an earlier configuration" if item.name else "is no name"
            raise SteeringError(
                "invalid_value",
                f"{item.name[:80]!r} {fault}: give each one a name of its own",
                f"{path}.name",
            )
        if (item.steering is None) == (item.system is None):
            name = "steering" if item.system is None else "system"
            raise SteeringError(
                "invalid_value",
                "a configuration needs either steering or system",
                f"{path}.{name}",
            )
        if item.steering is None:
            made.append(Configuration(item.name, system=item.system))
            continue
        path = f"{path}.steering"
        accepted = await context.accept(item.steering, path, report=True, empty_allowed=True)
        if not accepted.spec.edits:
            made.append(Configuration(item.name))
            continue
        several = body.interactions and len(accepted.spec.edits) > 1
        alone = await _alone(context, accepted, path) if several else ()
        made.append(Configuration(item.name, accepted, alone=alone))
    return made


async def _alone(context: Context, accepted: Accepted, path: str) -> tuple[Accepted, ...]:
    """Each edit by itself, with the protected features of its own SAE."""
    spec, made = accepted.spec, []
    for edit in spec.edits:
        protect = tuple(pair for pair in spec.protect if pair[0] == edit.sae)
        alone = replace(spec, edits=(edit,), protect=protect, report=False)
        try:
            made.append(Accepted(alone, await context.catalog.prepare(alone)))
        except SteeringError as error:
            raise SteeringError(error.code, error.message, path) from None
    return tuple(made)


async def cases_of(
    context: Context, body: Body, configurations: Sequence[Configuration], max_tokens: int
) -> list[Case]:
    """A case for each text with a completion; for the others, one for each configuration.

    The latter have no completion yet: the configuration answers the text first.

    Args:
        context: the study's context.
        body: the body.
        configurations: what `configurations_of` made of it.
        max_tokens: how many tokens an answer may have.

    Raises:
        SteeringError: as `Context.tokens`; ``invalid_value`` for a text without a completion that
            needs one, and for a system message beside a text that is no conversation.
    """
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
        unsteered = await context.tokens(text, path, room=room, answered=True)
        prompts = []
        for j, configuration in enumerate(configurations):
            prompt = unsteered.prompt
            if configuration.system is not None:
                system_path = f"configurations[{j}].system"
                prompt = await _with_system(
                    context, text, configuration.system, room, path, system_path
                )
            prompts.append(prompt)
        if answered:
            made += [Case(i, (j,), unsteered, (prompts[j],)) for j in every]
        else:
            made.append(Case(i, every, unsteered, tuple(prompts)))
    if any(configuration.control for configuration in configurations):
        return made
    return _again(made, len(configurations), max_tokens)


async def _with_system(
    context: Context, text: TextBody, system: str, room: int, path: str, system_path: str
) -> tuple[int, ...]:
    """A text's prompt with this system message, which replaces its own if it has one."""
    if text.messages is None:
        raise SteeringError(
            "invalid_value",
            f"a system message ({system_path}) needs a text of messages, but this one has a prompt",
            within(path, "prompt"),
        )
    others = [message for message in text.messages if message.get("role") not in _SYSTEM]
    messages = [{"role": "system", "content": system}, *others]
    try:
        changed = text.model_copy(update={"messages": messages})
        return (await context.tokens(changed, path, room=room, answered=True)).prompt
    except SteeringError as error:
        raise SteeringError(error.code, error.message, system_path) from None


def _again(cases: list[Case], num_configurations: int, max_tokens: int) -> list[Case]:
    """The same cases, of which the shortest ones, at least one, are to be run twice."""
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
    """How many tokens its completion has, or an answer may have."""
    return len(case.unsteered.completion) or max_tokens


def charge(
    context: Context,
    cases: Sequence[Case],
    configurations: Sequence[Configuration],
    max_tokens: int,
) -> None:
    """Reckon with the tokens of all runs. Raises SteeringError ``study_too_large`` for too many."""
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
