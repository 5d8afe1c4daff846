"""From the command line to the arguments of vLLM's own command.

Everything that can be refused is refused here, before a port opens or an engine starts.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from sae.errors import SAEError
from server.allow_list import NotInstalledError, allow_ours, installed_entry_points
from server.presets.store import open_store
from server.seams import SEAMS
from server.start.checked_sae import CheckedSAE, check, refuse_equal_names
from server.start.cpu_memory import leave_memory
from server.start.engine import steering_arguments
from server.start.errors import RefusedStartError
from server.start.flags import (
    PRESET_FLAG,
    SAE_FLAG,
    ServerOptions,
    add_flags,
    flags_help,
    split_flag,
)
from steering.config import CONFIG_KEY, SteeringConfig
from steering.vllm.seams import refuse_missing, refuse_missing_seams
from steering.vllm.support import UnsupportedEngineError


def start_arguments(argv: Sequence[str], command: Any) -> Namespace:
    """The arguments for one of vLLM's commands, with an engine that steers through the named SAEs.

    Args:
        argv: what follows the command's name.
        command: makes a `CLISubcommand` of vLLM's; called once plugins are on vLLM's list.

    Raises:
        RefusedStartError: for what this project refuses; vLLM's own refusals are its own.
    """
    try:
        refuse_missing_seams()
        refuse_missing(SEAMS)
        allow_ours(os.environ, installed_entry_points())
        flags, rest = split_flag(SAE_FLAG, "NAME=SOURCE", argv)
        presets, rest = split_flag(PRESET_FLAG, "NAME=FILE", rest)
        # The SAEs first: importing vLLM takes seconds, and a wrong path is seen at once.
        checked = [sae for flag in flags for sae in check(flag)]
        refuse_equal_names(checked)
        args = parse(rest, command())
        add_presets(args, presets)
        checked += [sae for flag in ServerOptions.of(args).saes for sae in check(flag)]
        refuse_equal_names(checked)
        if not checked and (flag := ServerOptions.of(args).preset_flag):
            raise RefusedStartError(f"{flag}: a preset steers through an SAE, give {SAE_FLAG}")
        if checked:
            steer_engine(args, checked)
    except (SAEError, NotInstalledError, UnsupportedEngineError) as error:
        raise RefusedStartError(str(error)) from error
    return args


def parse(argv: Sequence[str], command: Any) -> Namespace:
    """Parse with vLLM's parser; our flags are on it for `--help` and for `--config` files."""
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.startup import cli_env_setup
    except ImportError:  # where vLLM 0.32 has it
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm-sae")
    subparser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    subparser.usage = f"vllm-sae {_USAGES[command.name]} [any vllm {command.name} flag]"
    routes = command.name == "serve"
    subparser.description = f"{flags_help(routes=routes)}\n\n{subparser.description}"
    subparser.epilog = subparser.epilog.replace("vllm ", "vllm-sae ")
    add_flags(subparser, routes=routes)
    args: Namespace = parser.parse_args([command.name, *argv])
    leave_memory(args, subparser)
    configure_logging_from_args(args)
    command.validate(args)
    if getattr(args, "model_tag", None) is not None:
        args.model = args.model_tag
    return args


_USAGES = {
    "serve": "serve MODEL --sae NAME=SOURCE",
    "run-batch": "run-batch -i INPUT.jsonl -o OUTPUT.jsonl --model MODEL --sae NAME=SOURCE",
}


def add_presets(args: Namespace, presets: Sequence[str]) -> None:
    """Put the values of `--steering-preset` back beside those of a `--config` file.

    Raises:
        RefusedStartError: if the command opens no port.
    """
    if not presets:
        return
    if not hasattr(args, "steering_preset"):
        raise RefusedStartError(
            f"{PRESET_FLAG}: only a server has presets; here each line says how it is steered"
        )
    args.steering_preset = [*presets, *args.steering_preset]


def check_presets(args: Namespace, options: ServerOptions, vllm_config: Any) -> None:
    """Raises SAEError if a request could not ask for what a preset does, or its name is taken."""
    if options.preset_flag is None:
        return
    from steering.vllm.door import limits_of, open_catalog

    config = SteeringConfig.from_additional_config(args.additional_config)
    max_model_len = vllm_config.model_config.max_model_len
    catalog = open_catalog(config, max_model_len, limits_of(vllm_config))
    names = args.served_model_name or [args.model]
    served = [names] if isinstance(names, str) else list(names)
    adapters = [module.name for module in args.lora_modules or ()]
    open_store(options, catalog, lambda: (*served, *adapters))


def steer_engine(args: Namespace, checked: Sequence[CheckedSAE]) -> None:
    """Check the SAEs against the model, and put the steering engine into the arguments.

    Raises:
        SAEError: if an SAE does not fit the model, or a preset is wrong.
        RefusedStartError: if a flag has a wrong value or leaves no place for steering.
    """
    from vllm import AsyncEngineArgs, envs

    options = ServerOptions.of(args)
    options.check()
    refuse_flags(args, rust_frontend=envs.VLLM_USE_RUST_FRONTEND)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    vllm_config = engine_args.create_engine_config(headless=getattr(args, "headless", False))
    merge_into(args, steering_arguments(checked, vllm_config, options))
    check_presets(args, options, vllm_config)


def refuse_flags(args: Namespace, *, rust_frontend: bool) -> None:
    """Raises RefusedStartError for vLLM's flags that leave no place for steering."""
    refusals = (
        (args.worker_cls != "auto", "--worker-cls: steering has a worker class of its own"),
        (args.scheduler_cls is not None, "--scheduler-cls: steering has a scheduler of its own"),
        (CONFIG_KEY in args.additional_config, f"--additional-config: {CONFIG_KEY!r} is taken"),
        (args.skip_tokenizer_init, "--skip-tokenizer-init: special tokens would be unknown"),
        (getattr(args, "grpc", False), "--grpc: requests over gRPC cannot carry steering"),
        (rust_frontend, "VLLM_USE_RUST_FRONTEND: its routes cannot carry steering"),
        (args.runner == "pooling", "--runner pooling: only generating models can be steered"),
    )
    for refused, why in refusals:
        if refused:
            raise RefusedStartError(f"cannot serve {SAE_FLAG} with {why}")


def merge_into(args: Namespace, engine: dict[str, Any]) -> None:
    """Put arguments of an engine into parsed flags, beside the user's own `--additional-config`."""
    for name, value in engine.items():
        current = getattr(args, name)
        setattr(args, name, {**current, **value} if isinstance(value, dict) else value)
