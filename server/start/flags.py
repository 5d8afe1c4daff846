"""The flags that this project adds to vLLM's, each declared once.

A flag is a field of `ServerOptions`: its name, default, help and limit stand there, and the parser,
the help, the check and whoever reads the value take them from there.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from server.start.errors import RefusedStartError
from steering.config import (
    DEFAULT_MAX_ROWS,
    LEAST_MAX_READ_VALUES,
    RESIDENT_CHOICES,
    RESIDENT_TURNS,
)
from steering.request.catalog import SCAN_LIMIT_BYTES
from steering.request.limits import MAX_INTERVENTIONS, MAX_TOP_K
from steering.studies.study import MAX_STUDY_TOKENS
from steering.vllm.giving_way import DEFAULT_SHARE

SAE_FLAG: Final = "--sae"
PRESET_FLAG: Final = "--steering-preset"
TITLE: Final = "Steering"
DESCRIPTION: Final = "Steering through SAE features."


def _flag(
    name: str,
    default: Any,
    *,
    least: float | None = None,
    most: float | None = None,
    why: str = "",
    routes_only: bool = False,
    **argument: Any,
) -> Any:
    """A field of `ServerOptions`.

    Args:
        name: as on the command line.
        default: of the field and the flag.
        least: what a number must not be below, unless it is left out.
        most: what it must not be above.
        why: the reason for the lower limit.
        routes_only: whether only commands that open a port have it.
        argument: the rest of `add_argument`'s.
    """
    metadata: dict[str, Any] = {"name": name, "least": least, "most": most, "why": why}
    metadata |= {"routes_only": routes_only, "argument": argument}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ServerOptions:
    """What the command line says about steering."""

    saes: tuple[str, ...] = _flag(
        SAE_FLAG,
        (),
        nargs="+",
        action="extend",
        dest="sae",
        metavar="NAME=SOURCE[,hook=HOOK][,layer=L][,format=FORMAT][,sink_norm=N]",
        help="An SAE, a transcoder or a direction to serve: a path, "
        "hf://OWNER/REPO[/SUBFOLDER][@REVISION] or sae_lens://RELEASE/SAE_ID. If the source has "
        "several layers, layer=L takes one of them and layer=all takes each, as NAME.L. If the "
        "files do not say where it belongs, add hook=HOOK, or for a transcoder "
        "reads=HOOK,writes=HOOK. May be given several times.",
    )
    max_rows: int = _flag(
        "--steering-max-rows",
        DEFAULT_MAX_ROWS,
        least=MAX_INTERVENTIONS,
        why="as many as one request may edit",
        type=int,
        metavar="N",
        help="How many features the running requests may edit together; other requests wait.",
    )
    max_read_values: int | None = _flag(
        "--steering-max-read-values",
        None,
        least=MAX_TOP_K,
        why="as many as one token may have read",
        type=int,
        metavar="N",
        help="How many features one request may have read: those of each covered token of its "
        "prompt and max_tokens, in each of its n choices. Default: as many as one choice may ask "
        f"for, at least {LEAST_MAX_READ_VALUES}.",
    )
    max_study_tokens: int = _flag(
        "--steering-max-study-tokens",
        MAX_STUDY_TOKENS,
        least=1,
        why="or no study could run",
        routes_only=True,
        type=int,
        metavar="N",
        help="How many tokens one study may send through the model, in all of its runs.",
    )
    study_share: float = _flag(
        "--steering-study-share",
        DEFAULT_SHARE,
        least=0.01,
        most=1,
        why="or a study beside traffic would not end",
        routes_only=True,
        type=float,
        metavar="SHARE",
        help="Which share of the time studies may have while requests are served; 1: as much as "
        "one run of a text at a time takes. Without other requests they have all of it.",
    )
    max_body_bytes: int = _flag(
        "--steering-max-body-bytes",
        64 * 2**20,
        least=2**10,
        why="or hardly any conversation would fit",
        routes_only=True,
        type=int,
        metavar="N",
        help="How many bytes the body of a request may have, on any route.",
    )
    resident: str = _flag(
        "--steering-resident",
        RESIDENT_TURNS,
        choices=RESIDENT_CHOICES,
        help="Which SAEs a GPU holds whole beside the model. turns: top-k ones, and one place in "
        "which the others take turns if a `read` or `error_term: false` needs all of one; all: "
        "every SAE; none: no SAE, and what needs all of one is refused. Has no effect on a CPU.",
    )
    self_check: bool | None = _flag(
        "--steering-self-check",
        None,
        routes_only=True,
        action=BooleanOptionalAction,
        help="Once the server runs, measure each SAE's L0 and variance explained on a short text "
        "and log them, with a warning if they look wrong. By default only for the first "
        f"{SCAN_LIMIT_BYTES / 1e9:.0f} GB of weights, which are read at start anyway.",
    )

    presets: tuple[str, ...] = _flag(
        PRESET_FLAG,
        (),
        routes_only=True,
        nargs="+",
        action="extend",
        metavar="NAME=FILE",
        help="A name that requests may give as `model`, and the JSON file with the `steering` that "
        "it stands for. May be given several times.",
    )
    preset_folder: str | None = _flag(
        "--steering-presets",
        None,
        routes_only=True,
        metavar="DIR",
        help="A folder whose every NAME.json is such a preset. Presets that clients make at "
        "/v1/steering/presets are kept in it; without it they can make none.",
    )
    default_preset: str | None = _flag(
        "--steering-default",
        None,
        routes_only=True,
        metavar="NAME",
        help="The preset that steers requests to the model itself; a request's own "
        '`"steering": {"interventions": []}` opts out.',
    )
    studio: bool = _flag(
        "--steering-studio",
        True,
        routes_only=True,
        action=BooleanOptionalAction,
        help="Serve the studio, a web page on which to steer and look, at /studio.",
    )

    @classmethod
    def of(cls, args: Namespace) -> ServerOptions:
        """The options among parsed flags; defaults if vLLM's own command parsed them."""
        values: dict[str, Any] = {
            each.name: getattr(args, _dest(each), each.default) for each in fields(cls)
        }
        for each in fields(cls):
            if each.default == ():
                values[each.name] = tuple(values[each.name])
        return cls(**values)

    @property
    def preset_flag(self) -> str | None:
        """The first of the flags about presets that was given, None if none was."""
        given = (self.presets, self.preset_folder, self.default_preset)
        names = (PRESET_FLAG, "--steering-presets", "--steering-default")
        return next((name for name, value in zip(names, given, strict=True) if value), None)

    def check(self) -> None:
        """Raises RefusedStartError if a value is beyond its limits."""
        for each in fields(self):
            value, name = getattr(self, each.name), each.metadata["name"]
            least, most = each.metadata["least"], each.metadata["most"]
            if value is None:
                continue
            # Not the other way round: NaN is within no limits.
            if least is not None and not value >= least:
                why = each.metadata["why"]
                raise RefusedStartError(f"{name} {value}: must be at least {least}, {why}")
            if most is not None and not value <= most:
                raise RefusedStartError(f"{name} {value}: must be at most {most}")


def add_flags(parser: Any, *, routes: bool) -> None:
    """Put the flags on a parser, in a group of their own; `routes` if its command opens a port."""
    group = parser.add_argument_group(TITLE, DESCRIPTION)
    for each in fields(ServerOptions):
        if each.metadata["routes_only"] and not routes:
            continue
        # `extend` would add to a default that is shared.
        default = [] if each.default == () else each.default
        name = each.metadata["name"]
        group.add_argument(name, default=default, **each.metadata["argument"])


def flags_help(*, routes: bool) -> str:
    """What `--help` says of these flags, to stand before vLLM's hundreds."""
    parser = ArgumentParser(usage=SUPPRESS, add_help=False)
    add_flags(parser, routes=routes)
    return parser.format_help().strip()


def split_flag(flag: str, shape: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of every `flag` in `argv`, and `argv` without them.

    Taken out because vLLM's parser warns of any flag that is given twice.

    Args:
        flag: as on the command line.
        shape: what is expected after it.
        argv: the words of the command line.

    Raises:
        RefusedStartError: if nothing follows the flag.
    """
    values, rest = [], []
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        if word == flag:
            if not waiting:
                raise RefusedStartError(f"{flag}: expected {shape} after it")
            values.append(waiting.pop(0))
        elif word.startswith(f"{flag}="):
            values.append(word.removeprefix(f"{flag}="))
        else:
            rest.append(word)
    return values, rest


def _dest(each: Any) -> str:
    name: str = each.metadata["name"]
    return str(each.metadata["argument"].get("dest", name.lstrip("-").replace("-", "_")))
