"""What edits, or a system message in their place, do to texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np

from sae.numbers import finite
from steering.studies.cases import Case, Configuration, cases_of, charge, configurations_of
from steering.studies.comparison import Comparison, Side
from steering.studies.evaluate_body import DEFAULT_MAX_TOKENS, DEFAULT_TOP_K, Body
from steering.studies.evaluation import Answer as Answer
from steering.studies.evaluation import Evaluated
from steering.studies.scoring import Scorer
from steering.studies.study import Context
from steering.vllm.reader import Run, Text


async def evaluate(context: Context, asked: Body) -> dict[str, Any]:
    """Answer POST /v1/steering/evaluate.

    Raises:
        SteeringError: if the body cannot be answered, with the code and path of what is wrong.
    """
    configurations = await configurations_of(context, asked)
    saes = await _saes(context, asked)
    max_tokens = asked.max_tokens or DEFAULT_MAX_TOKENS
    cases = await cases_of(context, asked, configurations, max_tokens)
    charge(context, cases, configurations, max_tokens)
    found = [
        Evaluated(
            configuration.name,
            alone=[] if asked.interactions and configuration.system is None else None,
        )
        for configuration in configurations
    ]
    _expect(context, cases, configurations)
    cases = await _answered(context, cases, configurations, max_tokens, found)
    names = tuple(dict.fromkeys(name for name, _ in saes))
    noise = await _compare(context, cases, configurations, names, found)
    decode = context.vocabulary.decode if asked.detail else None
    return {
        "object": "steering.evaluation",
        "noise": {"kl": noise},
        "configurations": [
            evaluated.to_json(
                len(asked.texts),
                _features(context, evaluated, saes),
                lambda name: context.catalog.card(name).writes,
                decode,
            )
            for evaluated in found
        ],
    }


async def _saes(context: Context, body: Body) -> list[tuple[str, int]]:
    """The names of the SAEs at which texts are read, and how many features of each are wanted."""
    found = []
    for i, item in enumerate(body.features or ()):
        name = context.sae(item.sae, f"features[{i}]")
        await context.catalog.prepare_whole(name, f"features[{i}].sae")
        found.append((name, item.top_k or DEFAULT_TOP_K))
    return found


def _expect(
    context: Context,
    cases: Sequence[Case],
    configurations: Sequence[Configuration],
) -> None:
    steps = 0
    for case in cases:
        tried = len(case.configurations)
        alone = sum(len(configurations[j].alone) for j in case.configurations)
        answers = 0 if case.unsteered.completion else tried
        steps += answers + tried + alone + case.again
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
            text = Text(cases[i].prompts[0])
            yield Run.of(text, accepted, max_tokens=max_tokens, detokenize=True)

    async with aclosing(context.reader.each(runs())) as finished:
        async for number, finished_run in finished:
            i = places[number]
            case = made[i]
            choice = finished_run.output.outputs[0]
            ids = tuple(choice.token_ids)
            made[i] = replace(case, unsteered=Text(case.unsteered.prompt, ids))
            # As it would be served: without special tokens, or the token that ended it.
            found[case.configurations[0]].answers[case.text] = choice.text
            context.progress.step()
    return made


async def _compare(
    context: Context,
    cases: Sequence[Case],
    configurations: Sequence[Configuration],
    saes: tuple[str, ...],
    found: Sequence[Evaluated],
) -> float | None:
    """Compare all cases and put the figures into ``found``.

    Returns:
        The mean KL of two unsteered runs.
    """
    comparisons, roles = [], []
    for case in cases:
        sides: list[Side] = []
        # Configuration and edit (None: all of its edits) of each side; None: the unsteered text.
        of_sides: list[tuple[int, int | None] | None] = []
        for j, text in zip(case.configurations, case.texts, strict=True):
            configuration = configurations[j]
            sides.append(Side(text.prompt, text.completion, configuration.accepted, saes))
            of_sides.append((j, None))
            for edit, accepted in enumerate(configuration.alone):
                sides.append(Side(text.prompt, text.completion, accepted))
                of_sides.append((j, edit))
        unsteered = Side(case.unsteered.prompt, case.unsteered.completion)
        if case.again:
            sides.append(unsteered)
            of_sides.append(None)
        comparisons.append(Comparison(unsteered, [(side, ()) for side in sides]))
        roles.append(of_sides)
    noise = []
    scorer = Scorer(context.reader, context.catalog)
    async with aclosing(scorer.compare_all(comparisons)) as compared:
        async for i, side, figures in compared:
            case, role = cases[i], roles[i][side]
            if role is None:
                noise.append(figures.kl)
            else:
                found[role[0]].put(case.text, role[1], case.unsteered.completion, figures)
                found[role[0]].add_changes(figures.changes)
                if configurations[role[0]].control:
                    noise.append(figures.kl)
            context.progress.step()
    return finite(float(np.concatenate(noise).mean()))


def _features(
    context: Context, evaluated: Evaluated, saes: Sequence[tuple[str, int]]
) -> list[dict[str, Any]]:
    return [
        evaluated.changes[name].to_json(top_k, context.catalog.features(name).label)
        for name, top_k in saes
    ]
