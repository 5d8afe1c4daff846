"""The `vllm-sae` command, which is also `python -m server`."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

COMMANDS: Final = ("serve", "run-batch", "study", "inspect-sae", "import-labels", "demo")
REFUSED: Final = 2
FAILED: Final = 1

EXAMPLES: Final = """\
examples:
  vllm-sae demo
  vllm-sae inspect-sae hf://OWNER/REPO/SUBFOLDER
  vllm-sae serve MODEL --sae NAME=hf://OWNER/REPO/SUBFOLDER --port 8000
  vllm-sae serve --help
  vllm-sae run-batch -i IN.jsonl -o OUT.jsonl --model MODEL --sae NAME=SOURCE
  vllm-sae study FILE.json --url http://localhost:8000"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # These three take vLLM's flags, and its parser is slow to import.
    if words[:1] == ["serve"]:
        from server.commands.serve import serve

        return _run(serve, words[1:])
    if words[:1] == ["run-batch"]:
        from server.commands.run_batch import run_batch

        return _run(run_batch, words[1:])
    if words[:1] == ["demo"] and not {"-h", "--help"}.intersection(words):
        from server.commands.demo import demo

        return demo(words[1:])
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        return _failed(_unknown(words[0], words), REFUSED)
    parser = _parser()
    if not words:
        parser.print_help(sys.stderr)
        return REFUSED
    args, flags = parser.parse_known_args(words)
    if flags and getattr(args, "model", None) is None:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if args.command == "study":
        return _study(args, flags)
    if args.command == "import-labels":
        from server.commands.import_labels import import_labels

        return import_labels(args.source, args.export, args.force)
    from server.commands.inspect_sae import inspect_sae

    return inspect_sae(args.source, args.model, flags)


def _study(args: argparse.Namespace, flags: Sequence[str]) -> int:
    from server.commands.study import study

    return study(
        args.file,
        url=args.url,
        api_key=args.api_key,
        model=args.model,
        saes=args.sae,
        output=args.output,
        max_tokens=args.steering_max_study_tokens,
        flags=flags,
    )


def _run(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run a command of vLLM's and return the exit code; an error is the last line on stderr."""
    from server.start.engine_death import EngineDiedError
    from server.start.errors import EngineStartError, RefusedStartError, in_one_line

    try:
        command(argv)
    except RefusedStartError as error:
        return _failed(str(error), REFUSED)
    except (EngineDiedError, EngineStartError) as error:
        return _failed(str(error), FAILED)
    except Exception as error:
        traceback.print_exc()
        return _failed(in_one_line(error), FAILED)
    return 0


def _failed(why: str, code: int) -> int:
    print(f"vllm-sae: error: {why}", file=sys.stderr, flush=True)
    return code


def _unknown(word: str, words: Sequence[str]) -> str:
    """What was probably meant instead of a command that does not exist."""
    if close := get_close_matches(word, COMMANDS, n=1):
        return f"unknown command {word!r}; did you mean `vllm-sae {close[0]}`?"
    if any(each == "--sae" or each.startswith("--sae=") for each in words):
        return f"unknown command {word!r}; did you mean `vllm-sae serve {word} --sae ...`?"
    return f"unknown command {word!r}; the commands are {', '.join(COMMANDS)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-sae",
        description="Serve a model that each request may steer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vllm-sae {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "serve", help="serve MODEL --sae NAME=SOURCE [any vllm serve flag]", add_help=False
    )
    commands.add_parser(
        "run-batch",
        help="answer a file of requests: -i INPUT.jsonl -o OUTPUT.jsonl --model MODEL "
        "--sae NAME=SOURCE",
        add_help=False,
    )
    _add_study(commands)
    inspect = commands.add_parser(
        "inspect-sae",
        help="print the card of an SAE and check its files",
        usage="vllm-sae inspect-sae SOURCE[,hook=HOOK][,layer=L][,format=FORMAT][,sink_norm=N] "
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
            metavar="SOURCE[,hook=HOOK][,layer=L][,format=FORMAT][,sink_norm=N]",
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
        help="import exports of another model, layer or size all the same; features past the "
        "SAE's last one are left out",
    )
    commands.add_parser(
        "demo",
        help="serve the model and the SAE that come with the package, and show a steered answer",
        usage="vllm-sae demo [any vllm serve flag, e.g. --port 8001]",
    )
    return parser


def _add_study(commands: Any) -> None:
    study = commands.add_parser(
        "study",
        help="run the studies in a file on a running server, or on an engine started for them",
        usage="vllm-sae study FILE.json [-o OUT.json] (--url URL [--api-key KEY] | "
        "--model MODEL --sae NAME=SOURCE [any vllm engine flag])",
        description='FILE.json holds one study, {"study": NAME, "sae": NAME, "body": {...}}, a '
        "list of them, or an object of them by name. The answers are printed in the same form.",
    )
    study.add_argument("file", metavar="FILE.json", help="the studies; - for standard input")
    study.add_argument(
        "-o", "--output", metavar="OUT.json", help="where the answers go; default: standard output"
    )
    study.add_argument("--url", help="a running server, such as http://localhost:8000")
    study.add_argument("--api-key", metavar="KEY", help="the API key of that server")
    study.add_argument("--model", help="without --url: the model to run")
    study.add_argument(
        "--sae",
        metavar="NAME=SOURCE",
        nargs="+",
        action="extend",
        default=[],
        help="without --url: the model's SAEs, written as for serve",
    )
    study.add_argument(
        "--steering-max-study-tokens",
        metavar="N",
        type=int,
        help="without --url: how many tokens one study may send through the model",
    )


def _version() -> str:
    try:
        return version("vllm-sae")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
