"""`vllm-sae study`: studies from a file, on a running server or on an engine started for them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

import httpx

from sae.errors import SAEError
from server.allow_list import NotInstalledError, allow_ours, installed_entry_points
from server.errors import error_object
from server.start.arguments import merge_into, refuse_flags
from server.start.checked_sae import check, refuse_equal_names
from server.start.cpu_memory import leave_memory
from server.start.engine import naming_the_cause, steering_arguments
from server.start.errors import EngineStartError, RefusedStartError
from server.start.flags import ServerOptions
from steering.errors import SteeringError
from steering.studies.progress import Listener
from steering.studies.registry import STUDIES, Study

STOP_SECONDS: Final = 10.0
CONNECT_SECONDS: Final = 10.0
_DATA: Final = "data: "

Answer = dict[str, Any]


class StudyFileError(ValueError):
    """A file that does not say which studies to run."""


@dataclass(frozen=True)
class Task:
    """One study of a file.

    Attributes:
        study: which study.
        sae: the SAE's name if it is a study of one SAE, else None.
        body: as the route takes it.
    """

    study: Study
    sae: str | None
    body: Mapping[str, Any]

    @property
    def path(self) -> str:
        """The path that it is POSTed to."""
        return self.study.route.replace("{sae}", quote(self.sae or "", safe="/"))

    @classmethod
    def of(cls, entry: object, where: str) -> Task:
        """The task that an object of a file stands for. Raises StudyFileError if it is none."""
        if not isinstance(entry, Mapping) or not isinstance(entry.get("body"), Mapping):
            raise StudyFileError(f"{where}: expected an object with a study and a body")
        if unknown := entry.keys() - {"study", "sae", "route", "body"}:
            raise StudyFileError(f"{where}: unknown field {sorted(unknown)[0]!r:.60}")
        name, sae = entry.get("study"), entry.get("sae")
        if "route" in entry:
            if {"study", "sae"} & entry.keys():
                raise StudyFileError(f"{where}: give either a route, or a study and an sae")
            name, sae = _of_route(entry["route"])
        if not isinstance(name, str) or name not in STUDIES:
            known = ", ".join(STUDIES)
            raise StudyFileError(f"{where}: no such study; the studies are {known}")
        study = STUDIES[name]
        if study.of_sae != isinstance(sae, str) or (sae is not None and not study.of_sae):
            what = "needs the name of an SAE, `sae`" if study.of_sae else "takes no `sae`"
            raise StudyFileError(f"{where}: {name} {what}")
        return cls(study, sae, entry["body"])


def _of_route(route: object) -> tuple[str | None, str | None]:
    """The study and the SAE that a path names; nothing if it names none."""
    for study in STUDIES.values():
        if found := study.pattern.fullmatch(route if isinstance(route, str) else ""):
            return study.name, unquote(found["sae"]) if study.of_sae else None
    return None, None


#: Runs one task, and tells the listener how far it is.
Runner = Callable[[Task, Listener], Answer]


def study(
    file: str,
    *,
    url: str | None = None,
    api_key: str | None = None,
    model: str | None = None,
    saes: Sequence[str] = (),
    output: str | None = None,
    max_tokens: int | None = None,
    flags: Sequence[str] = (),
) -> int:
    """Run the studies of a file, and print or write their answers; returns the exit code.

    The file holds one study, `{"study", "sae", "body"}` or `{"route", "body"}`, a list of them, or
    an object of them; what is printed has the same form. A study that is refused has `{"error"}` in
    its place.

    Args:
        file: its path, - for standard input.
        url: a running server's URL.
        api_key: that server's key.
        model: without a server, the model to run.
        saes: the model's SAEs, as `--sae` takes them.
        output: where the answers are written; standard output if left out.
        max_tokens: without a server, how many tokens one study may send through the model.
        flags: how to run the model, flags of `vllm serve`.

    Returns:
        0; 1 if a study was refused or nothing could be run.
    """
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        tasks, form = read_tasks(text)
        with _runner(url, api_key, model, saes, max_tokens, flags) as run:
            answers = [_answer(run, task, f"{i + 1}/{len(tasks)}") for i, task in enumerate(tasks)]
        shown = json.dumps(form(answers), indent=2, ensure_ascii=False) + "\n"
        if output is None:
            sys.stdout.write(shown)
        else:
            Path(output).write_text(shown, encoding="utf-8")
    except (
        *(StudyFileError, OSError, UnicodeError, SAEError, RefusedStartError, NotInstalledError),
        httpx.HTTPError,
    ) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        print(f"vllm-sae: {said:.500}", file=sys.stderr)
        return 1
    return int(any("error" in answer for answer in answers))


def read_tasks(text: str) -> tuple[list[Task], Callable[[list[Answer]], object]]:
    """The studies of a file, and a function that puts their answers into the file's form.

    Raises:
        StudyFileError: if it holds none.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise StudyFileError("the file is not valid JSON") from None
    if isinstance(content, list) and content:
        return [Task.of(entry, f"study {i}") for i, entry in enumerate(content)], list
    if isinstance(content, Mapping) and "body" in content:
        return [Task.of(content, "the study")], lambda answers: answers[0]
    if isinstance(content, Mapping) and content:
        names = list(content)
        tasks = [Task.of(entry, f"study {name!r:.60}") for name, entry in content.items()]
        return tasks, lambda answers: dict(zip(names, answers, strict=True))
    raise StudyFileError("the file holds no study: expected one, or a list or an object of them")


def _answer(run: Runner, task: Task, place: str) -> Answer:
    """What a study answers, or its error; its progress is told on standard error."""
    shown = sys.stderr.isatty()

    def tell(done: int, of: int) -> None:
        if shown:
            print(f"\r{place} {task.study.name} {done}/{of} ", end="", file=sys.stderr, flush=True)

    try:
        return run(task, tell)
    except SteeringError as error:
        return {"error": error_object(error)}
    finally:
        if shown:
            print(file=sys.stderr)


@contextmanager
def _runner(
    url: str | None,
    api_key: str | None,
    model: str | None,
    saes: Sequence[str],
    max_tokens: int | None,
    flags: Sequence[str],
) -> Iterator[Runner]:
    if url is not None:
        with on_server(url, api_key) as run:
            yield run
        return
    if model is None or not saes:
        raise StudyFileError("give --url of a running server, or --model and --sae to start one")
    with on_engine(model, saes, max_tokens, flags) as run:
        yield run


@contextmanager
def on_server(url: str, api_key: str | None) -> Iterator[Runner]:
    """Run studies on a running server, at its root or at its `/v1`."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
    root = url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=root, headers=headers, timeout=timeout) as client:
            yield lambda task, tell: _posted(client, task, tell)
    except httpx.TransportError as error:
        raise httpx.TransportError(f"{root}: {str(error) or type(error).__name__}") from error


def _posted(client: httpx.Client, task: Task, tell: Listener) -> Answer:
    body = {**task.body, "stream": True}
    with client.stream("POST", task.path, json=body) as response:
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            return _refused(response)
        found: Answer | None = None
        for line in response.iter_lines():
            if not line.startswith(f"{_DATA}{{"):
                continue
            event = json.loads(line.removeprefix(_DATA))
            if event.get("object") == "steering.progress":
                tell(event["done"], event["of"])
            else:
                found = event
    if found is None:
        raise httpx.RemoteProtocolError(f"{task.path}: ended without an answer")
    return found


def _refused(response: httpx.Response) -> Answer:
    """The error of an answer without events."""
    raw = response.read()
    try:
        content = json.loads(raw)
    except ValueError:
        content = None
    if isinstance(content, dict) and "error" in content:
        # vLLM's error for a refused key is a plain string.
        error = content["error"]
        return {"error": error if isinstance(error, dict) else {"message": str(error)}}
    raise httpx.RemoteProtocolError(
        f"{response.url}: status {response.status_code}, which is no answer of a study"
    )


@contextmanager
def on_engine(
    model: str, saes: Sequence[str], max_tokens: int | None, flags: Sequence[str]
) -> Iterator[Runner]:
    """Run studies on an engine that is started for them and ends with them.

    Raises:
        SAEError, RefusedStartError: if a server would not start.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    allow_ours(os.environ, installed_entry_points())
    from vllm import LLM

    from steering.vllm.offline_studies import OfflineStudies

    try:
        engine_args, limit = _engine_args(model, saes, max_tokens, flags)
        with naming_the_cause():
            llm = LLM.from_engine_args(engine_args)
    except EngineStartError as error:
        raise RefusedStartError(f"cannot run {model}: {error}") from error
    except (SAEError, RefusedStartError):
        raise
    except Exception as error:
        # vLLM's own: a model that is not there, a flag that does not go with it, no memory.
        said = " ".join(str(error).split())
        raise RefusedStartError(f"cannot run {model}: {said:.500}") from error
    try:
        studies = OfflineStudies(llm, limit)
        yield lambda task, tell: studies.run(task.study.name, task.body, task.sae, tell)
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=STOP_SECONDS)


def _engine_args(
    model: str, saes: Sequence[str], max_tokens: int | None, flags: Sequence[str]
) -> tuple[Any, int]:
    """vLLM's `EngineArgs`, and the limit of a study's tokens."""
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = ServerOptions()
    if max_tokens is not None:
        options = ServerOptions(max_study_tokens=max_tokens)
        options.check()
    checked = [sae for flag in saes for sae in check(flag)]
    refuse_equal_names(checked)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm-sae study FILE"))
    parser.set_defaults(disable_log_stats=True)
    args = parser.parse_args(["--model", model, *flags])
    leave_memory(args, parser)
    refuse_flags(args, rust_frontend=False)
    vllm_config = EngineArgs.from_cli_args(args).create_engine_config()
    merge_into(args, steering_arguments(checked, vllm_config, options))
    return EngineArgs.from_cli_args(args), options.max_study_tokens
