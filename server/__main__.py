"""The `vllm-sae` command, which is also `python -m server`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final

REFUSED: Final = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # The flags of these two are vLLM's, whose parser is slow to import.
    if words[:1] == ["serve"]:
        return _serve(words[1:])
    if words[:1] == ["demo"] and not {"-h", "--help"}.intersection(words):
        from server.demo import demo

        return demo(words[1:])
    parser = _parser()
    args, flags = parser.parse_known_args(words)
    if flags and getattr(args, "model", None) is None:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if args.command == "import-labels":
        from server.import_labels import import_labels

        return import_labels(args.source, args.export, args.force)
    from server.inspect_sae import inspect_sae

    return inspect_sae(args.source, args.model, flags)


def _serve(argv: Sequence[str]) -> int:
    from server.engine_death import EngineDiedError
    from server.serve import RefusedStartError, serve

    try:
        serve(argv)
    except RefusedStartError as error:
        print(f"vllm-sae: error: {error}", file=sys.stderr, flush=True)
        return REFUSED
    except EngineDiedError as error:
        print(f"vllm-sae: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-sae", description="Serve a model that each request may steer."
    )
    parser.add_argument("--version", action="version", version=f"vllm-sae {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "serve", help="serve MODEL --sae NAME=SOURCE [any vllm serve flag]", add_help=False
    )
    inspect = commands.add_parser(
        "inspect-sae",
        help="print the card of an SAE and check its files",
        usage="vllm-sae inspect-sae SOURCE[,hook=HOOK][,format=FORMAT][,sink_norm=N] "
        "[--model MODEL [any vllm engine flag]]",
    )
    inspect.add_argument(
        "--model",
        help="also run this model on a short text, and measure how the SAE reconstructs it",
    )
    labels = commands.add_parser(
        "import-labels",
        help="write the labels and statistics of Neuronpedia exports beside an SAE's weights",
        description="Write the labels, maximum activations, densities and examples of Neuronpedia "
        "exports into the file of features beside an SAE's weights, in the SAE's own units. "
        "A file that is there already is replaced.",
    )
    for command in (inspect, labels):
        command.add_argument(
            "source",
            metavar="SOURCE[,hook=HOOK][,format=FORMAT][,sink_norm=N]",
            help="a path, hf://OWNER/REPO[/SUBFOLDER][@REVISION] or sae_lens://RELEASE/SAE_ID",
        )
    labels.add_argument(
        "export",
        metavar="EXPORT",
        nargs="+",
        help="the folder of one Neuronpedia source, with {features,explanations,activations}/"
        "batch-N.jsonl.gz in it, or such a file",
    )
    labels.add_argument(
        "--force",
        action="store_true",
        help="take exports of another model, layer or size all the same; features past the SAE's "
        "last one are left out",
    )
    commands.add_parser(
        "demo",
        help="serve the model and the SAE that come along, and show a steered answer",
        usage="vllm-sae demo [any vllm serve flag, e.g. --port 8001]",
    )
    return parser


def _version() -> str:
    try:
        return version("vllm-sae")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
