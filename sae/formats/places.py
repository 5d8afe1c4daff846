"""Where a dictionary reads and writes: what its files and the user say, and which decides."""

from __future__ import annotations

import re
from pathlib import Path

from sae.card import KIND_SAE, KIND_TRANSCODER, READ_ONLY_KINDS, HookPoint
from sae.errors import SAEError
from sae.formats.layout import PUBLISHED_FOLDERS, Config, SAEFiles
from sae.hook_names import UnknownHookError, parse_hook
from sae.pass_order import place_in_pass
from sae.source import ResolvedSAE
from sae.unserved import refuse_by_name, refuse_word_of_another_kind

#: TransformerLens' copy of the stream between attention and MLP, which the MLP alone is given.
_COPY_FOR_THE_MLP = ".hook_mlp_in"


def choose_hook(path: Path, ref: ResolvedSAE, stated: str | None, guessed: str | None) -> HookPoint:
    """An SAE's hook point: stated by its configuration, by `hook=`, or by the publisher's names.

    Args:
        path: what the messages name.
        ref: what the user said.
        stated: what the configuration says, in any spelling; `hook=` must agree with it if it is
            understood, and decides if it is not.
        guessed: what the file or folder name says; `hook=` takes precedence.

    Raises:
        SAEError: naming the file, and what to write.
    """
    if ref.reads is not None or ref.writes is not None:
        raise SAEError(
            f"{path}: reads= and writes= state the places of a transcoder, and this is an SAE; "
            f"state its hook point as {ref.source},hook=blocks.LAYER.hook_resid_post"
        )
    example = "hook=blocks.LAYER.hook_resid_post"
    if stated is None:
        # A kind that the names rule out cannot be had by stating a hook point.
        guess = _named(path, ref, guessed, example)
        folders = "/".join(path.parent.parts[-PUBLISHED_FOLDERS:])
        refuse_by_name(str(path), folders)
        refuse_word_of_another_kind(str(path), folders, ref.source)
        hook = _asked(ref.hook) or guess
    else:
        hook = _agreed(path, ref, "hook", stated, example)
        _refuse_copy(path, ref, stated, hook)
    if hook is None:
        raise SAEError(
            f"{path}: its hook point is stated nowhere; state it as {ref.source},{example}"
        )
    _refuse_read_only(path, hook)
    return hook


def choose_layer_output(files: SAEFiles, ref: ResolvedSAE, pattern: re.Pattern[str]) -> HookPoint:
    """The hook point of an SAE without a configuration: the output of the layer that names tell.

    Args:
        files: the SAE's.
        ref: what the user said; `hook=` takes precedence over the names.
        pattern: its first group is the layer, in the file's name, a folder's or the source's.

    Raises:
        SAEError: naming the file, and what to write.
    """
    layer = files.search(ref, pattern)
    guessed = None if layer is None else f"blocks.{layer}.hook_resid_post"
    return choose_hook(files.path, ref, stated=None, guessed=guessed)


def choose_stated(
    config: Config, ref: ResolvedSAE, reads: str | None, writes: str | None
) -> tuple[str, HookPoint, HookPoint]:
    """The kind, and where it reads and writes, by a configuration that can state both.

    Args:
        config: what the messages name.
        ref: what the user said.
        reads: what the configuration says of where it reads, in any spelling.
        writes: the same of where it writes; None, or what `reads` says, for an SAE.

    Raises:
        SAEError: naming the file, and what to write.
    """
    if writes is None or writes == reads:
        hook = choose_hook(config.path, ref, reads, guessed=None)
        return KIND_SAE, hook, hook
    return KIND_TRANSCODER, *choose_places(config.path, ref, reads, writes)


def choose_places(
    path: Path, ref: ResolvedSAE, reads: str | None, writes: str | None, *, guessed: bool = False
) -> tuple[HookPoint, HookPoint]:
    """Where a transcoder reads and where it writes.

    Args:
        path: what the messages name.
        ref: what the user said.
        reads: what the files say of where it reads, in any spelling; None if nothing.
        writes: the same of where it writes.
        guessed: whether the two come from names; `reads=` and `writes=` then take precedence.

    Raises:
        SAEError: naming the file, and what to write.
    """
    example = "reads=blocks.LAYER.mlp.hook_in,writes=blocks.LAYER.hook_mlp_out"
    if ref.hook is not None:
        raise SAEError(
            f"{path}: this is a transcoder, which reads at one place and writes at another; if its "
            f"files do not say where, state both as {ref.source},{example}"
        )
    found = []
    for key, stated in (("reads", reads), ("writes", writes)):
        asked = _asked(getattr(ref, key))
        if stated is None or (guessed and asked is not None):
            found.append(asked)
        else:
            found.append(_agreed(path, ref, key, stated, example))
    read_point, write_point = found
    if read_point is None or write_point is None:
        raise SAEError(
            f"{path}: where this transcoder reads and writes is stated nowhere; state it as "
            f"{ref.source},{example}"
        )
    _refuse_read_only(path, write_point)
    if place_in_pass(str(write_point)) < place_in_pass(str(read_point)):
        earlier = "layer" if write_point.layer < read_point.layer else "place of that layer"
        raise SAEError(
            f"{path}: it reads at {read_point} and writes at {write_point}, an earlier {earlier}"
        )
    return read_point, write_point


def _asked(name: str | None) -> HookPoint | None:
    return None if name is None else parse_hook(name)


def _agreed(path: Path, ref: ResolvedSAE, key: str, stated: str, example: str) -> HookPoint | None:
    asked = _asked(getattr(ref, key))
    try:
        found = _named(path, ref, stated, example)
    except UnknownHookError:
        if asked is None:
            raise
        return asked
    if asked is not None and found != asked:
        raise SAEError(f"{path}: {key}={asked} contradicts the configuration's {stated}")
    return found


def _named(path: Path, ref: ResolvedSAE, name: str | None, example: str) -> HookPoint | None:
    """The hook point that a file names; the error says which file, and what to do about it."""
    if name is None:
        return None
    try:
        return parse_hook(name)
    except UnknownHookError as error:
        raise UnknownHookError(
            f"{path}: {error}; if you know the place, state it as {ref.source},{example}"
        ) from error
    except SAEError as error:
        raise SAEError(f"{path}: {error}") from error


def _refuse_copy(path: Path, ref: ResolvedSAE, stated: str, hook: HookPoint | None) -> None:
    """What reads there reads the stream, and what is added there is no part of it."""
    if stated.strip().endswith(_COPY_FOR_THE_MLP) and ref.hook is None:
        raise SAEError(
            f"{path}: {stated} is a copy of the stream that the MLP alone is given, and edits here "
            f"are added to the stream itself; if that will do, state it as {ref.source},hook={hook}"
        )


def _refuse_read_only(path: Path, hook: HookPoint) -> None:
    if hook.kind in READ_ONLY_KINDS:
        raise SAEError(
            f"{path}: {hook} can be read but not edited: what stands there is not part of the "
            "stream; an SAE of it cannot be served at another hook point"
        )
