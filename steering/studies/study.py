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

    async def ask(self, engine: int, method: str, *args: Any) -> list[Any]: ...

    async def run(self, run: Run) -> Finished: ...

    def each(self, runs: Iterable[Run]) -> AsyncGenerator[tuple[int, Finished], None]: ...

    async def all(
        self, runs: Iterable[Run], progress: Callable[[int], None] | None = None
    ) -> list[Finished]: ...


@dataclass
class Context:
    """One study's.

    Attributes:
        catalog: the SAEs.
        reader: runs texts.
        vocabulary: makes tokens of texts, and texts of tokens.
        max_tokens: how many tokens the study may send through the model.
        progress: is told how far it is.
        unembedding: the model's final norm and output head, where its checkpoint shows them; may
            read files when it is first called.
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
            text: one of a body's.
            path: of the text in the body, "" if its members are the body's own.
            room: tokens that must fit into a context beside its own: 1 for a text whose last token
                enters the model, `max_tokens` for one that is answered.
            answered: whether a conversation ends where the model's answer begins; left out, it does
                if there is a completion.

        Raises:
            SteeringError: if it is no text, the model does not take it, or it is too long.
        """
        check_text(text, path)
        prompt = await self._prompt(text, path, answered)
        made = Text(tuple(prompt), tuple(await self._completion(text, path)))
        if made.length + room > self.vocabulary.max_model_len:
            beside = f", and {room} beside them," if room else ""
            raise SteeringError(
                "invalid_value",
                f"{made.length} tokens{beside} are more than the model's context of "
                f"{self.vocabulary.max_model_len}",
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
        """The tokens of a string of the body, of which there is at least one; ids stay ids.

        Args:
            text: the string.
            path: of it in the body.
            special_tokens: whether those are added that begin or end a prompt.

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
            raw: as it came.
            path: of the object in the body.
            report: whether what is run with it is to say what was edited.
            empty_allowed: take one that edits nothing, which is a control.

        Raises:
            SteeringError: as a request's `steering` is refused, with paths that begin with `path`;
                ``unsupported_combination`` for `stop_when`.
        """
        try:
            spec = self.catalog.parse(raw, empty_allowed=True)
            if spec.stop_when:
                raise SteeringError(
                    "unsupported_combination",
                    "a study's texts are given to their end: leave stop_when out",
                    f"{_FIELD}.stop_when",
                )
            if not (spec.edits or empty_allowed):
                raise SteeringError(
                    "invalid_value",
                    f"this needs 1 to {MAX_INTERVENTIONS} interventions",
                    f"{_FIELD}.interventions",
                )
            spec = replace(spec, report=report, read=None)
            return Accepted(spec, await self.catalog.prepare(spec))
        except SteeringError as error:
            raise SteeringError(error.code, error.message, _moved(error.param, path)) from None

    def sae(self, name: str | None, path: str) -> str:
        """The SAE that an object of the body names; the only one if it names none.

        Args:
            name: as it came.
            path: of the object in the body, "" for the body itself.

        Raises:
            SteeringError: ``unknown_sae``, or ``sae_required`` if several are loaded.
        """
        return named_sae(name, within(path, "sae"), self.catalog.names)

    def features(self, sae: str, listed: Sequence[int], path: str) -> dict[int, str]:
        """The distinct features that a list of the body names, and where in it each stands first.

        Args:
            sae: the name of their SAE.
            listed: as they came.
            path: of the list in the body.

        Raises:
            SteeringError: ``feature_out_of_range``.
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
        """Reckon with so many further tokens through the model; all of them before anything runs.

        Args:
            tokens: of all runs together, those that may be generated included.
            param: the list that is too long if they are too many; None where no one list is.

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
    """Answer ``invalid_value`` for a text that the model does not take."""
    try:
        yield
    except SteeringError:
        raise
    except ValueError as error:
        said = " ".join(str(error).split())
        raise SteeringError("invalid_value", f"{said:.500}", param) from None


def _moved(param: str | None, path: str) -> str:
    """A path into a request's `steering` as one into the object at `path`."""
    return path if param is None else path + param.removeprefix(_FIELD)
