"""`vllm-sae inspect-sae`: what an SAE is, read from its files, and whether it fits a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae.card import SAECard
from sae.errors import SAEError
from sae.self_check import Outcome, reconstructs
from sae.source import parse_source
from server.allow_list import NotInstalledError, allow_ours, installed_entry_points
from server.self_check import check_offline
from server.start.arguments import merge_into, refuse_flags
from server.start.checked_sae import CheckedSAE, check_all
from server.start.engine import naming_the_cause, steering_arguments
from server.start.errors import EngineStartError, RefusedStartError
from server.start.flags import ServerOptions

#: For a text that is read once: more than its blocks take in any known model.
KV_CACHE_BYTES: Final = 2**30
MAX_MODEL_LEN: Final = 1024
STOP_SECONDS: Final = 10.0
#: Columns if the output is no terminal: no source is folded, so that it can be found with grep.
PIPE_COLUMNS: Final = 2**16


def inspect_sae(
    text: str,
    model: str | None = None,
    flags: Sequence[str] = (),
    console: Console | None = None,
) -> int:
    """Print an SAE's card after scanning all of it; returns the exit code, 0 or 1.

    With `layer=all` it prints a card for each layer.

    Args:
        text: `SOURCE[,hook=..]`.
        model: a model on which to check the SAE as well; what is found is printed under the card.
        flags: how to run it, flags of `vllm serve`.
        console: where to print; None for standard output.
    """
    console = console or Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    try:
        for checked in check_all(parse_source(text), scan_limit=None):
            console.print(card_table(checked.card))
            if model is not None:
                _print_check(console, checked, model, flags)
    except (SAEError, RefusedStartError, NotInstalledError) as error:
        print(f"vllm-sae: {error}", file=sys.stderr)
        return 1
    return 0


def _print_check(console: Console, checked: CheckedSAE, model: str, flags: Sequence[str]) -> None:
    card = checked.card
    if not reconstructs(card):
        console.print(f"a {card.kind} reconstructs nothing: there is nothing to measure")
        return
    outcome = check_on_model(checked, model, flags)
    console.print(outcome_table(outcome))
    if remarks := outcome.remarks:
        line = f"warning: {'; '.join(remarks)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def card_table(card: SAECard) -> Table:
    """The card as a table of two columns; a path may hold what Rich would take for markup."""
    table = Table(title=Text(f"SAE {card.id}"), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in card.to_json().items():
        if key not in ("id", "object"):
            shown = ", ".join(value) if isinstance(value, list) else value
            table.add_row(key, Text("-" if shown is None else str(shown)))
    return table


def outcome_table(outcome: Outcome) -> Table:
    """What was measured beside what is stated."""
    measured, stated = outcome.measured, outcome.stated
    sinks = f", sinks left out: {measured.sinks}" if measured.sinks else ""
    table = Table(title=f"on {measured.tokens} tokens{sinks}")
    for header in ("", "measured", "stated"):
        table.add_column(header, overflow="fold")
    for name, found, said in (
        ("L0", measured.l0, stated.l0),
        ("variance explained", measured.variance_explained, stated.variance_explained),
    ):
        table.add_row(name, f"{found:.3g}", "-" if said is None else f"{said:.3g}")
    table.add_row("model", Text(outcome.model), Text(stated.model or "-"))
    return table


def check_on_model(checked: CheckedSAE, model: str, flags: Sequence[str]) -> Outcome:
    """Start the engine on `model`, check the SAE there, and end the engine.

    Raises:
        SAEError, RefusedStartError: if a server would not start.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    allow_ours(os.environ, installed_entry_points())
    from vllm import LLM

    try:
        engine_args = _engine_args(checked, model, flags)
        with naming_the_cause():
            llm = LLM.from_engine_args(engine_args)
        try:
            return check_offline(llm, checked.reference)
        finally:
            llm.llm_engine.engine_core.shutdown(timeout=STOP_SECONDS)
    except (SAEError, RefusedStartError):
        raise
    except EngineStartError as error:
        raise RefusedStartError(f"cannot run {model}: {error}") from error
    except Exception as error:
        # vLLM's own: a model that is not there, a flag that does not go with it, no memory.
        said = " ".join(str(error).split())
        raise RefusedStartError(f"cannot run {model}: {said:.500}") from error


def _engine_args(checked: CheckedSAE, model: str, flags: Sequence[str]) -> Any:
    """vLLM's `EngineArgs`, sized for one short text unless the flags say otherwise."""
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm-sae inspect-sae SOURCE"))
    parser.set_defaults(
        enforce_eager=True,
        max_num_seqs=1,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        disable_log_stats=True,
    )
    args = parser.parse_args(["--model", model, *flags])
    refuse_flags(args, rust_frontend=False)
    vllm_config = EngineArgs.from_cli_args(args).create_engine_config()
    if args.max_model_len is None:
        args.max_model_len = min(MAX_MODEL_LEN, vllm_config.model_config.max_model_len)
    merge_into(args, steering_arguments([checked], vllm_config, ServerOptions()))
    return EngineArgs.from_cli_args(args)
