"""Every study: its name, its route and what it is made of.

A study is a module of this folder that has the study's name and holds

- a function of the same name: `async (context, asked)`, or `async (context, sae, asked)` for a
  study of one loaded SAE. `context` belongs to this study alone, and `asked` is its `Body`. Before
  anything runs, the function checks what the body's shape does not show, and raises SteeringError
  with the code and the path of what is wrong. It returns the answer's JSON object;
- `Body`, the strict model of the body, a `StudyBody`;
- `Answer`, a pydantic model that describes the answer and is never filled.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from pydantic import BaseModel

from steering.studies.body import StudyBody, parse_body
from steering.studies.study import Context


@dataclass(frozen=True)
class Study:
    """One kind of study.

    Attributes:
        name: the name of the study, its module and its function.
        route: the path of its route; `{sae}` in it stands for an SAE's name.
        summary: what it answers, in one line.
    """

    name: str
    route: str
    summary: str

    @property
    def of_sae(self) -> bool:
        """Whether it is a study of one SAE, which its route names."""
        return "{sae}" in self.route

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the paths of its route; the group `sae` is the SAE's name, if it is of one."""
        return re.compile(re.escape(self.route).replace(re.escape("{sae}"), "(?P<sae>.+)"))

    @property
    def body(self) -> type[StudyBody]:
        """The model of its body."""
        found: type[StudyBody] = self._module().Body
        return found

    @property
    def answer(self) -> type[BaseModel]:
        """The model that describes its answer."""
        found: type[BaseModel] = self._module().Answer
        return found

    async def run(self, context: Context, body: object, sae: str | None = None) -> dict[str, Any]:
        """Validate the body, run the study, and return its answer.

        Args:
            context: the study's context.
            body: the JSON value.
            sae: the name of a loaded SAE, if it is a study of one.

        Raises:
            SteeringError: if the body cannot be answered, with the code and path of what is wrong.
        """
        asked = parse_body(self.body, body)
        function: Callable[..., Awaitable[dict[str, Any]]] = getattr(self._module(), self.name)
        if not self.of_sae:
            return await function(context, asked)
        return await function(context, sae, asked)

    def _module(self) -> Any:
        return importlib.import_module(f"steering.studies.{self.name}")


STUDIES: Final = {
    study.name: study
    for study in (
        Study("evaluate", "/v1/steering/evaluate", "What edits, or a system message, do to texts."),
        Study("calibrate", "/v1/steering/calibrate", "How strong an edit may be within a budget."),
        Study(
            "contrast",
            "/v1/saes/{sae}/contrast",
            "Which features tell one set of texts from another.",
        ),
        Study("rank", "/v1/saes/{sae}/rank", "Which features move what comes after a text most."),
        Study(
            "attribute",
            "/v1/saes/{sae}/attribute",
            "Which features a completion's probability rests on.",
        ),
        Study("suggest", "/v1/steering/suggest", "An edit that makes wanted completions likelier."),
        Study("forecast", "/v1/steering/forecast", "What an edit does, from weights alone."),
    )
}
