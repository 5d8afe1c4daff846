"""`vllm-sae serve`: vLLM's own API server, with SAEs.

Everything that can be refused is refused before the port opens, in one line and with exit code 2.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sae.errors import SAEError
from server.allow_list import NotInstalledError, allow_ours, installed_entry_points
from server.start import engine_death
from server.start.checked_sae import (
    CheckedSAE,
    check,
    check_fit,
    refuse_equal_names,
)
from server.start.engine_death import EngineDiedError
from steering.config import (
    CONFIG_KEY,
    DEFAULT_MAX_ROWS,
    LEAST_MAX_READ_VALUES,
    REFUSAL_VARIABLE,
    SteeringConfig,
)
from steering.request.catalog import SCAN_LIMIT_BYTES
from steering.request.limits import MAX_INTERVENTIONS, MAX_TOP_K
from steering.request.special_tokens import special_token_ids
from steering.vllm.engine_arguments import engine_arguments
from steering.vllm.seams import refuse_missing_seams
from steering.vllm.support import UnsupportedEngineError

SAE_FLAG: Final = "--sae"
MAX_ROWS_FLAG: Final = "--steering-max-rows"
MAX_READ_VALUES_FLAG: Final = "--steering-max-read-values"
MAX_BODY_BYTES_FLAG: Final = "--steering-max-body-bytes"
SELF_CHECK_FLAG: Final = "--steering-self-check"

DEFAULT_MAX_BODY_BYTES: Final = 64 * 2**20
#: Of that flag: below it, hardly a conversation fits.
LEAST_BODY_BYTES: Final = 2**10


class RefusedStartError(Exception):
    """The server cannot start as asked; the message is one readable line."""


def serve(argv: Sequence[str]) -> None:
    """Run the server until it is stopped.

    Args:
        argv: what follows `serve` on the command line.

    Raises:
        RefusedStartError: for what this project refuses; vLLM's own refusals are its own.
        EngineDiedError: after the engine has ended by itself.
    """
    try:
        refuse_missing_seams()
        allow_ours(os.environ, installed_entry_points())
        flags, rest = split_sae_flags(argv)
        checked = [check(flag) for flag in flags]
        refuse_equal_names(checked)
        args = _parse(rest)
        checked += [check(flag) for flag in args.sae]
        refuse_equal_names(checked)
        if checked:
            _configure(args, checked)
    except (SAEError, NotInstalledError, UnsupportedEngineError) as error:
        raise RefusedStartError(str(error)) from error
    _run(args)


def split_sae_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of every `--sae` in `argv`, and `argv` without them.

    Taken out because vLLM's parser warns of any flag that is given twice.
    """
    values, rest = [], []
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        if word == SAE_FLAG:
            if not waiting:
                raise RefusedStartError(f"{SAE_FLAG}: expected NAME=SOURCE after it")
            values.append(waiting.pop(0))
        elif word.startswith(f"{SAE_FLAG}="):
            values.append(word.removeprefix(f"{SAE_FLAG}="))
        else:
            rest.append(word)
    return values, rest


def _parse(argv: Sequence[str]) -> Namespace:
    """Parse with vLLM's parser; `--sae` is on it for `--help` and for `--config` files."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.startup import cli_env_setup
    except ImportError:  # where vLLM 0.32 has it
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm-sae")
    command = ServeSubcommand()
    serve_parser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve_parser.usage = "vllm-sae serve MODEL --sae NAME=SOURCE [any vllm serve flag]"
    serve_parser.epilog = serve_parser.epilog.replace("vllm serve", "vllm-sae serve")
    group = serve_parser.add_argument_group("Steering", "Steering through SAE features.")
    group.add_argument(
        SAE_FLAG,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=SOURCE[,hook=HOOK][,format=FORMAT][,sink_norm=N]",
        help="An SAE to serve: a path, hf://OWNER/REPO[/SUBFOLDER][@REVISION] or "
        "sae_lens://RELEASE/SAE_ID. May be given several times.",
    )
    group.add_argument(
        MAX_ROWS_FLAG,
        type=int,
        default=DEFAULT_MAX_ROWS,
        help="How many features running requests may edit at once; more wait their turn.",
    )
    group.add_argument(
        MAX_READ_VALUES_FLAG,
        type=int,
        help="How many features one request may have read: those of each covered token of its "
        "prompt and max_tokens, in each of its n choices. Default: as many as one choice may ask "
        f"for, at least {LEAST_MAX_READ_VALUES}.",
    )
    group.add_argument(
        MAX_BODY_BYTES_FLAG,
        type=int,
        default=DEFAULT_MAX_BODY_BYTES,
        help="How many bytes the body of a request may have, on any route.",
    )
    group.add_argument(
        SELF_CHECK_FLAG,
        action=BooleanOptionalAction,
        default=None,
        help="Once the server runs, measure each SAE's L0 and variance explained on a short text "
        "and log them, with a warning where they look wrong. By default only for the first "
        f"{SCAN_LIMIT_BYTES / 1e9:.0f} GB of weights, which are read at start anyway.",
    )
    args: Namespace = parser.parse_args(["serve", *argv])
    configure_logging_from_args(args)
    command.validate(args)
    if args.model_tag is not None:
        args.model = args.model_tag
    return args


def _configure(args: Namespace, checked: Sequence[CheckedSAE]) -> None:
    """Check the SAEs against the model, and put the steering engine into the arguments."""
    from vllm import AsyncEngineArgs, envs

    refuse_flags(args, rust_frontend=envs.VLLM_USE_RUST_FRONTEND)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    vllm_config = engine_args.create_engine_config(headless=args.headless)
    steer(
        args,
        engine_for(checked, vllm_config, args.steering_max_rows, args.steering_max_read_values),
    )


def engine_for(
    checked: Sequence[CheckedSAE], vllm_config: Any, max_rows: int, max_read_values: int | None
) -> dict[str, Any]:
    """The arguments that make an engine of this configuration steer through these SAEs.

    Raises:
        SAEError: where an SAE does not fit the model.
        RefusedStartError: where the engine cannot be steered.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    from steering.vllm.support import refuse_unsupported

    d_model, num_layers = check_fit(checked, vllm_config.model_config)
    try:
        refuse_unsupported(vllm_config)
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        config = SteeringConfig(
            saes=tuple(sae.reference for sae in checked),
            d_model=d_model,
            num_layers=num_layers,
            special_token_ids=special_token_ids(tokenizer),
            max_rows=max_rows,
            max_read_values=max_read_values,
        )
        return engine_arguments(config)
    except UnsupportedEngineError as error:
        raise RefusedStartError(str(error)) from error


def refuse_flags(args: Namespace, *, rust_frontend: bool) -> None:
    """RefusedStartError for vLLM flags that leave no place for steering."""
    refusals = (
        (args.worker_cls != "auto", "--worker-cls: steering has a worker class of its own"),
        (args.scheduler_cls is not None, "--scheduler-cls: steering has a scheduler of its own"),
        (CONFIG_KEY in args.additional_config, f"--additional-config: {CONFIG_KEY!r} is taken"),
        (args.skip_tokenizer_init, "--skip-tokenizer-init: special tokens would be unknown"),
        (args.grpc, "--grpc: requests over gRPC cannot carry steering"),
        (rust_frontend, "VLLM_USE_RUST_FRONTEND: its routes cannot carry steering"),
        (args.runner == "pooling", "--runner pooling: only generating models can be steered"),
        (
            args.steering_max_rows < MAX_INTERVENTIONS,
            f"{MAX_ROWS_FLAG} {args.steering_max_rows}: must be at least {MAX_INTERVENTIONS}, "
            "what one request may edit",
        ),
        (
            args.steering_max_read_values is not None and args.steering_max_read_values < MAX_TOP_K,
            f"{MAX_READ_VALUES_FLAG} {args.steering_max_read_values}: must be at least "
            f"{MAX_TOP_K}, what one token may have read",
        ),
        (
            args.steering_max_body_bytes < LEAST_BODY_BYTES,
            f"{MAX_BODY_BYTES_FLAG} {args.steering_max_body_bytes}: must be at least "
            f"{LEAST_BODY_BYTES}",
        ),
    )
    for refused, why in refusals:
        if refused:
            raise RefusedStartError(f"cannot serve {SAE_FLAG} with {why}")


def steer(args: Namespace, engine: dict[str, Any]) -> None:
    """Put `engine_arguments` into parsed flags, beside the user's own `--additional-config`."""
    for name, value in engine.items():
        current = getattr(args, name)
        setattr(args, name, {**current, **value} if isinstance(value, dict) else value)


def _run(args: Namespace) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    # vLLM goes on without a plugin that cannot be imported; without ours steering would be ignored.
    importlib.import_module("server.plugin")
    with worker_refusals():
        ServeSubcommand.cmd(args)
    if engine_death.seen():
        raise EngineDiedError("the engine ended by itself, which is why the server ended")


@contextmanager
def worker_refusals() -> Iterator[None]:
    """Turn the failure of an engine into a RefusedStartError where a worker has left word why."""
    with tempfile.TemporaryDirectory(prefix="vllm-sae-") as folder:
        refusal = Path(folder) / "refusal"
        os.environ[REFUSAL_VARIABLE] = str(refusal)
        try:
            yield
        except Exception as error:
            if refusal.is_file():
                raise RefusedStartError(refusal.read_text().strip()) from error
            raise
