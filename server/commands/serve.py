"""`vllm-sae serve`: vLLM's own API server, with SAEs."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from server.start import engine_death
from server.start.arguments import start_arguments
from server.start.engine import naming_the_cause
from server.start.engine_death import EngineDiedError


def serve(argv: Sequence[str]) -> None:
    """Run the server until it is stopped.

    Args:
        argv: what follows `serve` on the command line.

    Raises:
        RefusedStartError: for what this project refuses; vLLM's own refusals are its own.
        EngineStartError: if the engine could not start.
        EngineDiedError: after the engine has ended by itself.
    """
    _run(start_arguments(argv, _command))


def _command() -> Any:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    return ServeSubcommand()


def _run(args: Namespace) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    # vLLM goes on without a plugin that cannot be imported; without ours steering would be ignored.
    importlib.import_module("server.plugin")
    with naming_the_cause():
        ServeSubcommand.cmd(args)
    if engine_death.seen():
        raise EngineDiedError("the engine ended by itself, which is why the server ended")
