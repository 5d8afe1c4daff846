"""What every study is given: the SAEs, a way to run texts, their tokens, and its limits."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from steering.errors import SteeringError
from steering.request.accepted import Accepted
from steering.request.catalog import Catalog
from steering.request.facts import named_sae
from steering.request.limits import MAX_INTERVENTIONS
from steering.request.shape_errors import shown
from steering.request.spec import nothing_loaded
from steering.studies.progress import Progress
from steering.studies.texts import TextBody, Tokens, check_text, within
from steering.unembedding import Unembedding
from steering.vllm.reader import Finished, Run, Text

#: Default of `--steering-max-study-tokens`.
MAX_STUDY_TOKENS: Final = 2**18
_FIELD: Final = "steering"


class Reader(Protocol):
    """Runs texts through the model; see `steering.vllm.reader`."""

    @property
    def keeping(self) -> AbstractAsyncContextManager[Any]: ...

    @property
    def engines(self) -> int: ...

    @property
    def external_blocks(self) -> bool: ...

    async def ask(
        self, engine: int, method: str, *args: Any, computes: bool = True
    ) -> list[Any]: ...

    async def run(self, run: Run) -> Finished: ...

    def each(self, runs: Iterable[Run]) -> AsyncGenerator[tuple[int, Finished], None]: ...

    async def all(
        self, runs: Iterable[Run], progress: Callable[[int], None] | None = None
    ) -> list[Finished]: ...


@dataclass
class Context:
    """What one study works with; each study has a context of its own.

    Attributes:
        catalog: the SAEs.
        reader: runs texts.
        vocabulary: turns texts into tokens, and tokens into texts.
        max_tokens: how many tokens the study may send through the model.
        progress: is told how much is done.
        unembedding: returns the model's final norm and output head, or None if its checkpoint does
            not show them; it may read files when it is first called.

    Raises:
        SteeringError: ``steering_unavailable`` if no SAE is loaded.
    """

    catalog: Catalog
    reader: Reader
    vocabulary: Tokens
    max_tokens: int = MAX_STUDY_TOKENS
    progress: Progress = field(default_factory=Progress)
    unembedding: Callable[[], Unembedding | None] = lambda: None
    _charged: int = 0

    def __post_init__(self) -> None:
        if not self.catalog.names:
            unavailable = nothing_loaded()
            raise SteeringError(unavailable.code, unavailable.message)

    async def tokens(
        self, text: TextBody, path: str, *, room: int = 0, answered: bool | None = None
    ) -> Text:
        """The tokens of a text.

        Args:
            text: a text of the body.
            path: the text's path in the body, "" if its members are the body's own.
            room: how many further tokens must fit into the context: 1 for a text whose last token
                enters the model, the answer's `max_tokens` for a text that is answered.
            answered: whether a conversation ends where the model's answer begins; None means that
                it does if there is a completion.

        Raises:
            SteeringError: ``invalid_value`` if it is not a text, if the model does not take it, or
                if it is too long.
        """
        check_text(text, path)
        prompt = await self._prompt(text, path, answered)
        made = Text(tuple(prompt), tuple(await self._completion(text, path)))
        if made.length + room > self.vocabulary.max_model_len:
            further = f" and {room} more" if room else ""
            raise SteeringError(
                "invalid_value",
                f"{made.length} tokens{further} do not fit into the model's context of "
                f"{self.vocabulary.max_model_len}: shorten the text",
                path or None,
            )
        return made

    async def _prompt(self, text: TextBody, path: str, answered: bool | None) -> list[int]:
        if text.messages is None:
            assert text.prompt is not None
            return await self.encode(text.prompt, within(path, "prompt"), special_tokens=True)
        wanted = text.completion is not None if answered is None else answered
        with _refusing(within(path, "messages")):
            return await self.vocabulary.chat(text.messages, generation_prompt=wanted)

    async def _completion(self, text: TextBody, path: str) -> list[int]:
        if text.completion is None:
            return []
        where = within(path, "completion")
        return await self.encode(text.completion, where, special_tokens=False)

    async def encode(
        self, text: str | Sequence[int], path: str, *, special_tokens: bool
    ) -> list[int]:
        """The tokens of a string of the body, at least one; token ids are returned as they are.

        Args:
            text: the string or the ids.
            path: its path in the body.
            special_tokens: whether the special tokens that begin or end a prompt are added.

        Raises:
            SteeringError: ``invalid_value`` if there is no token, an id is not in the vocabulary,
                or the text is too long.
        """
        with _refusing(path):
            ids = await self.vocabulary.encode(text, special_tokens=special_tokens)
            if not ids:
                raise ValueError("the text has no tokens")
        return ids

    async def accept(
        self, raw: object, path: str, *, report: bool = False, empty_allowed: bool = False
    ) -> Accepted:
        """Validate a `steering` object of the body, and check the weights that it needs.

        Its own `report` and `read` are validated and ignored.

        Args:
            raw: the object, as it came.
            path: the object's path in the body.
            report: whether runs with it are to report what was edited.
            empty_allowed: accept an object that edits nothing, which is a control.

        Raises:
            SteeringError: if a request with this `steering` would be refused, with paths that begin
                with ``path``; ``invalid_value`` if it has no edits and ``empty_allowed`` is false;
                ``unsupported_combination`` if it has `stop_when`.
        """
        try:
            spec = self.catalog.parse(raw, empty_allowed=True)
            if spec.stop_when:
                raise SteeringError(
                    "unsupported_combination",
                    "a study runs its texts to their end: leave stop_when out",
                    f"{_FIELD}.stop_when",
                )
            if not (spec.edits or empty_allowed):
                raise SteeringError(
                    "invalid_value",
                    f"a study needs 1 to {MAX_INTERVENTIONS} interventions",
                    f"{_FIELD}.interventions",
                )
            spec = replace(spec, report=report, read=None)
            return Accepted(spec, await self.catalog.prepare(spec))
        except SteeringError as error:
            raise SteeringError(error.code, error.message, _moved(error.param, path)) from None

    def sae(self, name: str | None, path: str) -> str:
        """The SAE that an object of the body names; the only one if it names none.

        Args:
            name: the name, as it came; None if there is none.
            path: the object's path in the body, "" for the body itself.

        Raises:
            SteeringError: ``unknown_sae`` if no loaded SAE has this name; ``sae_required`` if
                several are loaded and none is named.
        """
        return named_sae(name, within(path, "sae"), self.catalog.names)

    def features(self, sae: str, listed: Sequence[int], path: str) -> dict[int, str]:
        """The distinct features in a list of the body, each with the path where it first stands.

        Args:
            sae: name of their SAE.
            listed: the list, as it came.
            path: the list's path in the body.

        Raises:
            SteeringError: ``feature_out_of_range`` if the SAE does not have one of them.
        """
        d_sae = self.catalog.card(sae).d_sae
        places: dict[int, str] = {}
        for i, feature in enumerate(listed):
            place = f"{path}[{i}]"
            if not 0 <= feature < d_sae:
                raise SteeringError(
                    "feature_out_of_range", f"feature {shown(feature)} not in [0, {d_sae})", place
                )
            places.setdefault(feature, place)
        return places

    def charge(self, tokens: int, param: str | None = None) -> None:
        """Count tokens that the study will send through the model; call it before anything runs.

        Args:
            tokens: how many further tokens all runs have, those that may be generated included.
            param: the list to name if they are too many; None if it is not one list's fault.

        Raises:
            SteeringError: ``study_too_large`` if the study would need more than `max_tokens`.
        """
        self._charged += tokens
        if self._charged > self.max_tokens:
            raise SteeringError(
                "study_too_large",
                f"this study needs {self._charged} tokens through the model, the limit is "
                f"{self.max_tokens} (--steering-max-study-tokens)",
                param,
            )


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    """Turn the ValueError about a text that the model does not take into ``invalid_value``."""
    try:
        yield
    except SteeringError:
        raise
    except ValueError as error:
        said = " ".join(str(error).split())
        raise SteeringError("invalid_value", f"{said:.500}", param) from None


def _moved(param: str | None, path: str) -> str:
    """A path into a request's `steering`, as a path into the object at ``path``."""
    return path if param is None else path + param.removeprefix(_FIELD)
