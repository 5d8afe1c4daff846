"""The presets of one API server, and the folder in which those made over HTTP are kept.

Several API servers may share a folder: each looks again before it answers, at most a few times a
second, and takes up what has changed. A file is written whole or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sae.errors import SAEError
from server.presets.preset import Preset, Validate, check_name, load_file, read_body
from server.start.flags import ServerOptions
from steering.errors import ForbiddenError, NotFoundError, SteeringError
from steering.request.catalog import Catalog

logger = logging.getLogger("vllm.sae.server")

MAX_PRESETS: Final = 256
#: Seconds after which the folder is looked at again.
LOOK_EVERY: Final = 0.25
_SUFFIX: Final = ".json"


#: What tells one version of a file from the next.
_Stamp = tuple[int, int, int]


@dataclass
class PresetStore:
    """Presets by name.

    Attributes:
        validate: checks a `steering` object; raises SteeringError.
        fixed: those of `--steering-preset`.
        folder: that of `--steering-presets`; None if presets cannot be made over HTTP.
        default: the preset that steers requests to the base model.
        taken: names of served models and adapters, which no preset may have.
        clock: seconds, monotonic.
    """

    validate: Validate
    fixed: dict[str, Preset] = field(default_factory=dict)
    folder: Path | None = None
    default: str | None = None
    taken: Callable[[], Collection[str]] = tuple
    clock: Callable[[], float] = time.monotonic
    _kept: dict[str, Preset] = field(default_factory=dict)
    _seen: dict[str, _Stamp] = field(default_factory=dict)
    _looked: float = field(default=-1e9)
    # PUT and DELETE run in threads, while another thread may look at the folder.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def open(self) -> None:
        """Read the folder for the first time.

        Raises:
            SAEError: in one line, if something in it is no preset, or there are too many.
        """
        for name in self.fixed:
            self._refuse_taken(name)
        if self.folder is not None:
            if not self.folder.is_dir():
                raise SAEError(f"--steering-presets {self.folder}: no such folder")
            self._look(strict=True)
        if len(self) > MAX_PRESETS:
            raise SAEError(f"{len(self)} presets, the limit is {MAX_PRESETS}")
        if self.default is not None and self.get(self.default) is None:
            raise SAEError(f"--steering-default {self.default}: there is no such preset")

    def __len__(self) -> int:
        return len(self.fixed.keys() | self._kept.keys())

    def all(self) -> list[Preset]:
        """Every preset, by name."""
        self._look_again()
        return [preset for _, preset in sorted({**self._kept, **self.fixed}.items())]

    def get(self, name: str | None) -> Preset | None:
        """The preset of that name, None if there is none."""
        self._look_again()
        return self.known(name)

    @property
    def in_use(self) -> bool:
        """Whether there is a preset, or may be one."""
        return bool(self.fixed) or self.folder is not None

    def known(self, name: str | None) -> Preset | None:
        """As `get`, but from what was last seen: no file is looked at."""
        return None if name is None else self.fixed.get(name) or self._kept.get(name)

    async def catch_up(self) -> None:
        """Look at the folder again if it is time, off the event loop."""
        if self.folder is not None and self.clock() - self._looked >= LOOK_EVERY:
            await asyncio.to_thread(self._look_again)

    def need(self, name: str) -> Preset:
        """The preset of that name. Raises NotFoundError if there is none."""
        preset = self.get(name)
        if preset is None:
            raise _unknown(name)
        return preset

    def put(self, name: str, body: object) -> tuple[Preset, bool]:
        """Make or replace a preset, and say whether it is new.

        Raises:
            SteeringError: if its name or its steering is refused, there are too many, or presets
                cannot be changed.
        """
        folder = self._changeable(name)
        check_name(name)
        self._refuse_taken_by_request(name)
        steering, description = read_body(body, self.validate)
        preset = Preset(name, steering, description, int(time.time()), fixed=False)
        with self._lock:
            self._look()
            new = name not in self._kept
            if new and len(self) >= MAX_PRESETS:
                raise SteeringError(
                    "too_many_presets",
                    f"there are {len(self)} presets, the limit is {MAX_PRESETS}; delete one first",
                    "name",
                )
            try:
                _write_whole(folder / f"{name}{_SUFFIX}", preset.to_file())
            except OSError as error:
                raise _read_only(
                    f"the folder of presets cannot be written to: {error.strerror}"
                ) from error
            self._look()
        return self.need(name), new

    def delete(self, name: str) -> None:
        """Delete a preset.

        Raises:
            SteeringError: if there is none, or presets cannot be changed.
        """
        folder = self._changeable(name)
        with self._lock:
            self._look()
            if name not in self._kept:
                raise _unknown(name)
            if name == self.default:
                raise _read_only(
                    f"{name!r} is the preset of --steering-default, without which requests would "
                    "go on unsteered; restart the server with another"
                )
            try:
                (folder / f"{name}{_SUFFIX}").unlink(missing_ok=True)
            except OSError as error:
                raise _read_only(
                    f"the folder of presets cannot be written to: {error.strerror}"
                ) from error
            self._look()

    def _changeable(self, name: str) -> Path:
        if self.folder is None:
            raise _read_only(
                "presets cannot be changed over HTTP: the server was started without "
                "--steering-presets DIR"
            )
        if name in self.fixed:
            raise _read_only(
                f"{name!r} was given with --steering-preset and cannot be changed over HTTP"
            )
        return self.folder

    def _refuse_taken(self, name: str) -> None:
        if name in self.taken():
            raise SAEError(f"preset {name!r}: a served model or adapter has that name")

    def _refuse_taken_by_request(self, name: str) -> None:
        if name in self.taken():
            raise SteeringError(
                "invalid_value", f"{name!r} is the name of a served model or adapter", "name"
            )

    def _look_again(self) -> None:
        if self.folder is not None and self.clock() - self._looked >= LOOK_EVERY:
            with self._lock:
                self._look()

    def _look(self, *, strict: bool = False) -> None:
        """Take up what has changed in the folder.

        A file that is wrong is a refusal at start (`strict`). Later it is a warning, and what was
        there before stays: requests that name it must not go unsteered for somebody's slip.
        """
        if self.folder is None:
            return
        try:
            found = dict(_stamps(self.folder))
        except OSError as error:  # the folder is gone for a moment, while a volume is remounted
            logger.warning("presets: %s: %s", self.folder, error.strerror)
            return
        for name in self._seen.keys() - found.keys():
            del self._seen[name]
            if name == self.default:
                logger.warning("presets: the file of the default preset %r is gone", name)
            else:
                self._kept.pop(name, None)
        for name in sorted(found):
            if self._seen.get(name) == found[name]:
                continue
            try:
                if name in self.fixed:
                    raise SAEError(f"two presets are named {name!r}")
                self._refuse_taken(name)
                if name not in self._kept and len(self) >= MAX_PRESETS:
                    raise SAEError(f"preset {name!r} is one more than the limit, {MAX_PRESETS}")
                path = self.folder / f"{name}{_SUFFIX}"
                self._kept[name] = load_file(name, path, self.validate, fixed=False)
            except SAEError as error:
                if strict:
                    raise
                logger.warning("presets: left as it was: %s", error)
            self._seen[name] = found[name]
        self._looked = self.clock()


def _unknown(name: str) -> NotFoundError:
    return NotFoundError("unknown_preset", f"there is no preset {name[:80]!r}", "name")


def _read_only(message: str) -> ForbiddenError:
    return ForbiddenError("presets_read_only", message, "name")


def _stamps(folder: Path) -> Iterable[tuple[str, _Stamp]]:
    """Every `NAME.json` of a folder and its stamp."""
    for entry in os.scandir(folder):
        if entry.name.endswith(_SUFFIX) and entry.is_file():
            facts = entry.stat()
            yield (
                entry.name.removesuffix(_SUFFIX),
                (facts.st_mtime_ns, facts.st_size, facts.st_ino),
            )


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old one or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def validator(catalog: Catalog) -> Validate:
    """What checks a `steering` object as a request's would be checked, its weights included."""

    def validate(raw: object) -> None:
        catalog.prepare_now(catalog.parse(raw))

    return validate


def open_store(
    options: ServerOptions, catalog: Catalog, taken: Callable[[], Collection[str]]
) -> PresetStore:
    """The presets of the command line. Raises SAEError, in one line, if one is wrong."""
    validate = validator(catalog)
    store = PresetStore(
        validate,
        fixed_presets(options.presets, validate),
        None if options.preset_folder is None else Path(options.preset_folder).expanduser(),
        options.default_preset,
        taken,
    )
    store.open()
    return store


def parse_flag(flag: str, validate: Validate) -> Preset:
    """The preset of one `--steering-preset NAME=FILE`.

    Raises:
        SAEError: in one line.
    """
    name, separator, file = flag.partition("=")
    if not separator or not file:
        raise SAEError(f"--steering-preset {flag!r}: expected NAME=FILE")
    return load_file(name, Path(file).expanduser(), validate, fixed=True)


def fixed_presets(flags: Iterable[str], validate: Validate) -> dict[str, Preset]:
    """The presets of every `--steering-preset`. Raises SAEError, also if two have one name."""
    presets: dict[str, Preset] = {}
    for flag in flags:
        preset = parse_flag(flag, validate)
        if preset.name in presets:
            raise SAEError(f"two presets are named {preset.name!r}")
        presets[preset.name] = preset
    return presets
