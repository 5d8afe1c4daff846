"""`vllm-sae run-batch`: vLLM's runner of batch files, whose lines may carry `steering`."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from server.admission import accept
from server.errors import error_object
from server.protocol import SteerableChatCompletionRequest
from server.start.arguments import start_arguments
from server.start.engine import naming_the_cause
from steering.errors import SteeringError
from steering.report import Ticket, wants_report
from steering.request.catalog import Catalog
from steering.request.misplaced import refuse_misplaced
from steering.vllm.door import FIELD, catalog_for
from steering.vllm.ignored import refuse_ignored

Handler = Callable[[Any], Awaitable[Any]]


def run_batch(argv: Sequence[str]) -> None:
    """Answer every line of the input file.

    Args:
        argv: what follows `run-batch` on the command line.

    Raises:
        RefusedStartError: for what this project refuses; vLLM's own refusals are its own.
        EngineStartError: if the engine could not start.
    """
    args = start_arguments(argv, _command)
    with naming_the_cause():
        asyncio.run(_main(args))


def _command() -> Any:
    from vllm.entrypoints.cli.run_batch import RunBatchSubcommand

    return RunBatchSubcommand()


async def _main(args: Namespace) -> None:
    from prometheus_client import start_http_server
    from vllm.entrypoints.launchers import run_batch as runner

    if args.enable_metrics:
        start_http_server(port=args.port, addr=args.host or args.url)
    with steered_lines(runner):
        await runner.main(args)


@contextmanager
def steered_lines(runner: Any) -> Iterator[None]:
    """Let vLLM's runner read chats into requests that may carry `steering`, and steer them."""
    originals = (runner.ChatCompletionRequest, runner.run_batch, runner.run_request)
    _, run_all, run_request = originals
    catalogs: list[Catalog] = []

    async def run_all_steered(engine_client: Any, *rest: Any) -> None:
        catalogs.append(catalog_for(engine_client.vllm_config))
        await run_all(engine_client, *rest)

    async def run_steered(handler: Handler, line: Any, *rest: Any) -> Any:
        steered = SteeredLine(catalogs[0], handler)
        return steered.complete(await run_request(steered.handle, line, *rest))

    runner.ChatCompletionRequest = SteerableChatCompletionRequest
    runner.run_batch, runner.run_request = run_all_steered, run_steered
    try:
        yield
    finally:
        runner.ChatCompletionRequest, runner.run_batch, runner.run_request = originals


class SteeredLine:
    """One line of a batch file between its request and its entry in the output."""

    def __init__(self, catalog: Catalog, handler: Handler) -> None:
        self._catalog = catalog
        self._handler = handler
        self._ticket: Ticket | None = None
        self._refused: SteeringError | None = None

    async def handle(self, request: Any) -> Any:
        """What vLLM's handler answers. vLLM makes an error entry of what is raised here."""
        try:
            await self._accept(request)
            return await self._handler(request)
        except Exception as error:
            cause = error if isinstance(error, SteeringError) else error.__cause__
            if isinstance(cause, SteeringError):
                self._refused = cause
            raise

    def complete(self, entry: Any) -> Any:
        """The entry with the report, or with the refusal in the shape that the routes give it."""
        if self._refused is not None:
            entry.error = {"error": error_object(self._refused)}
        elif self._ticket is not None and entry.response.body is not None:
            entry.response.body.steering = self._ticket.to_json()
        return entry

    async def _accept(self, request: Any) -> None:
        if not isinstance(request, SteerableChatCompletionRequest):
            refuse_ignored(request)
            return
        refuse_misplaced(request.model_dump(), any_sae=bool(self._catalog.names))
        accepted = await accept(request, self._catalog)
        if accepted is None:
            return
        if wants_report(accepted.spec):
            self._ticket = Ticket(accepted.spec.report)
            accepted = accepted.reporting_to(self._ticket)
        request.extra_args[FIELD] = accepted
