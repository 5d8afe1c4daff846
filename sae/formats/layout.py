"""What a format's loader says: where in the files each canonical tensor lies, and what it means."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sae.card import KIND_SAE, HookPoint
from sae.errors import SAEError
from sae.numbers import finite, positive
from sae.source import ResolvedSAE
from sae.tensors import FLOAT_DTYPES, TensorFile

MAX_CONFIG_BYTES = 16 * 2**20
#: The most rows or columns that a tensor may have.
MAX_COUNT = 2**31 - 1
#: How many of the folders around a weight file a publisher may have named; the rest is the user's.
PUBLISHED_FOLDERS = 4
#: Objects of a configuration that may hold a sink_norm; "trainer" is dictionary_learning's.
_SINK_NORM_SECTIONS = ("metadata", "trainer")
#: Kinds for which messages have another word than cards.
_KIND_WORDS = {"sae": "SAE", "clt": "CLT"}


@dataclass(frozen=True)
class Config:
    """A configuration beside the weights.

    What reads a value raises SAEError, naming the file, if the value is not what it should be.
    """

    path: Path
    values: Mapping[str, Any]

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The value; the default if it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def section(self, key: str) -> Config:
        """A nested object, empty if it is missing."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise SAEError(f"{self.path}: {key} must be an object, got {value!r:.60}")
        return Config(self.path, value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string; the default if it is missing or null."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise SAEError(f"{self.path}: {key} must be a string, got {value!r:.60}")
        return value

    def words(self, key: str) -> str | None:
        """The value as text, whatever its type; None if it is missing or null."""
        value = self.get(key)
        return None if value is None else value if isinstance(value, str) else f"{value!r:.120}"

    def flag(self, key: str, default: bool) -> bool:
        """True or false; the default if it is missing or null."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise SAEError(f"{self.path}: {key} must be true or false, got {value!r:.60}")
        return value

    def count(self, key: str) -> int:
        """A positive integer that a shape can have."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SAEError(f"{self.path}: {key} must be a positive integer, got {value!r:.60}")
        if value > MAX_COUNT:
            raise SAEError(f"{self.path}: {key} must be at most {MAX_COUNT}, got {value!r:.60}")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        number = finite(self.get(key))
        if number is None:
            raise SAEError(f"{self.path}: {key} must be a finite number, got {self.get(key)!r:.60}")
        return number

    def sink_norm(self) -> float | None:
        """The norm above which a token is a sink, from the top or a section; None if unstated."""
        sections = (self.values.get(key) for key in _SINK_NORM_SECTIONS)
        for values in (self.values, *(part for part in sections if isinstance(part, dict))):
            value = values.get("sink_norm")
            if value is None:
                continue
            if (number := positive(value)) is None:
                raise SAEError(
                    f"{self.path}: sink_norm must be a positive finite number, got {value!r:.40}"
                )
            return number
        return None


@dataclass(frozen=True)
class SAEFiles:
    """A weight file, opened, and the configurations beside it by file name."""

    tensors: TensorFile
    configs: Mapping[str, Config]

    @property
    def path(self) -> Path:
        return self.tensors.path

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.tensors.headers)

    def config(self, *names: str) -> Config:
        """The first configuration of these names. Raises SAEError if there is none."""
        for name in names:
            if name in self.configs:
                return self.configs[name]
        raise SAEError(f"{self.path}: missing configuration: no {' or '.join(names)} beside it")

    def sink_norm(self) -> float | None:
        """What the first configuration that states a sink_norm says; None if none does."""
        stated = (config.sink_norm() for config in self.configs.values())
        return next((norm for norm in stated if norm is not None), None)

    def search(self, ref: ResolvedSAE, pattern: re.Pattern[str]) -> str | None:
        """The pattern's first group, in the file's name, the nearest folder's or the source's."""
        for part in (*reversed(self.path.parts), *reversed(ref.source.split("/"))):
            if match := pattern.search(part):
                return str(match.group(1))
        return None

    def folder(self, ref: ResolvedSAE, pattern: re.Pattern[str]) -> str | None:
        """The nearest folder, on disk or in the source, whose whole name matches the pattern."""
        folders = self.path.parent.parts[-PUBLISHED_FOLDERS:]
        for part in (*reversed(folders), *reversed(ref.source.split("/"))):
            if pattern.fullmatch(part):
                return part
        return None

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """A tensor's declared shape. Raises SAEError if it is missing or of another rank."""
        header = self.tensors.headers.get(name)
        if header is None:
            raise SAEError(f"{self.path}: missing tensor {name}")
        if len(header.shape) != rank:
            raise SAEError(
                f"{self.path}: {name} is {list(header.shape)}, expected {rank} dimensions"
            )
        return header.shape


@dataclass(frozen=True)
class Stored:
    """Where a canonical tensor lies. `transposed`: the file has [d_in, d_sae]. `scalar`: one
    number for all latents, shape [] or [1]. `row`: [d_in], the row of the one latent."""

    name: str
    transposed: bool = False
    scalar: bool = False
    row: bool = False


@dataclass(frozen=True)
class SAELayout:
    """One SAE as its files describe it, before any weight is read.

    `tensors` maps canonical names (W_enc [d_sae, d_in], W_dec [d_sae, d_out]; b_dec [d_out]; b_enc,
    threshold, b_gate, b_mag, r_mag [d_sae]; W_skip [d_out, d_in]) to what the file stores;
    `constants` gives vectors that are one stated number. `scale` is s, by which the SAE's input is
    scaled: in use are W_enc*s, W_dec/s and b_dec/s. `ignored` names tensors that play no part at
    inference.

    Attributes:
        hook: where it is edited: the first of `writes`.
        reads: where activations are read; None for `hook`.
        writes: where edits are added; empty for `hook` alone.
        d_out: width of what it writes; None for d_in.
        scale_out: s of the output, in place of `scale`: W_dec/s_out, b_dec/s_out.
        stored_places: W_dec is stored as [d_sae, stored_places, d_out]; None for [d_sae, d_out].
        first_place: which of these places is the first of `writes`; the others follow it.
        log_threshold: the threshold is stored as its logarithm.
        centered: it was trained on streams without their mean over d_in: it reads x - mean(x).
        threshold_over_decoder_norm: the threshold is compared with h_i |W_dec_i|, W_dec as stored.
        kind: one of `sae.card`'s.
        unit_rows: rows are scaled to norm 1 for use, as those of directions are.
        remarks: what the files leave open and what is assumed, for the user to know.
    """

    format: str
    architecture: str
    hook: HookPoint
    d_in: int
    d_sae: int
    tensors: Mapping[str, Stored]
    constants: Mapping[str, float] = field(default_factory=dict)
    k: int | None = None
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    scale: float = 1.0
    sink_norm: float | None = None
    ignored: Collection[str] = ()
    centered: bool = False
    threshold_over_decoder_norm: bool = False
    remarks: tuple[str, ...] = ()
    kind: str = KIND_SAE
    unit_rows: bool = False
    reads: HookPoint | None = None
    writes: tuple[HookPoint, ...] = ()
    d_out: int | None = None
    scale_out: float | None = None
    stored_places: int | None = None
    first_place: int = 0
    log_threshold: bool = False

    @property
    def read_point(self) -> HookPoint:
        """Where activations are read."""
        return self.reads or self.hook

    @property
    def write_points(self) -> tuple[HookPoint, ...]:
        """Where edits are added."""
        return self.writes or (self.hook,)

    @property
    def width_out(self) -> int:
        """d_out, which is d_in if it is left out."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def arithmetic(self) -> dict[str, Any]:
        """What is made of the tensors, as far as no card says it, in plain types.

        Two dictionaries of equal weights, cards and arithmetic compute the same.
        """
        names = (
            *("constants", "scale", "scale_out", "stored_places", "first_place", "log_threshold"),
            *("centered", "threshold_over_decoder_norm", "unit_rows"),
        )
        stored = {name: astuple(stored) for name, stored in sorted(self.tensors.items())}
        return {"tensors": stored, **{name: getattr(self, name) for name in names}}

    def check(self, tensors: TensorFile) -> None:
        """Check every tensor by its header.

        Raises:
            SAEError: if one is missing, misshaped, of integers or unexpected.
        """
        if self.d_in < 1 or self.d_sae < 1:
            raise SAEError(
                f"{tensors.path}: d_in is {self.d_in} and d_sae {self.d_sae}, both must be "
                "at least 1"
            )
        for canonical, stored in self.tensors.items():
            header = tensors.headers.get(stored.name)
            if header is None:
                raise SAEError(f"{tensors.path}: missing tensor {stored.name}")
            if header.dtype not in FLOAT_DTYPES:
                raise SAEError(
                    f"{tensors.path}: {stored.name} has dtype {header.dtype}, expected one of "
                    f"{', '.join(FLOAT_DTYPES)}"
                )
            expected = self._expected_shapes(canonical, stored)
            if header.shape not in expected:
                raise SAEError(
                    f"{tensors.path}: {stored.name} is {list(header.shape)}, "
                    f"expected {list(expected[0])} (d_in {self.d_in}, d_sae {self.d_sae})"
                )
        known = {stored.name for stored in self.tensors.values()} | set(self.ignored)
        extra = sorted(set(tensors.headers) - known)
        if extra:
            raise SAEError(
                f"{tensors.path}: unexpected tensor {extra[0]} in a {self.format} "
                f"{_KIND_WORDS.get(self.kind, self.kind)} of "
                f"architecture {self.architecture}"
            )
        if self.k is not None and self.k > self.d_sae:
            raise SAEError(f"{tensors.path}: k is {self.k}, more than d_sae {self.d_sae}")

    def _expected_shapes(self, canonical: str, stored: Stored) -> list[tuple[int, ...]]:
        if stored.row:
            return [(self.d_in,)]
        matrices: dict[str, tuple[int, ...]] = {
            "W_enc": (self.d_sae, self.d_in),
            "W_dec": (self.d_sae, self.width_out),
            "W_skip": (self.width_out, self.d_in),
        }
        if canonical == "W_dec" and self.stored_places is not None:
            return [(self.d_sae, self.stored_places, self.width_out)]
        if shape := matrices.get(canonical):
            return [shape[::-1] if stored.transposed else shape]
        if canonical == "b_dec":
            return [(self.width_out,)]
        return [(), (1,)] if stored.scalar else [(self.d_sae,)]


def linear_layers(encoder: str = "encoder", decoder: str = "decoder") -> dict[str, Stored]:
    """The four tensors of an SAE of two `torch.nn.Linear` of these names."""
    return {
        "W_enc": Stored(f"{encoder}.weight"),
        "W_dec": Stored(f"{decoder}.weight", transposed=True),
        "b_enc": Stored(f"{encoder}.bias"),
        "b_dec": Stored(f"{decoder}.bias"),
    }


def check_scaling_factor(files: SAEFiles, name: str, d_sae: int) -> tuple[str, ...]:
    """The name of an old file's finetuning factor [d_sae], to be ignored; empty if it has none.

    Raises:
        SAEError: if it has another shape, or is not 1 everywhere: SAELens 6 takes no other either.
    """
    header = files.tensors.headers.get(name)
    if header is None:
        return ()
    if header.dtype not in FLOAT_DTYPES or header.shape != (d_sae,):
        raise SAEError(
            f"{files.path}: {name} is {header.dtype} {list(header.shape)}, "
            f"expected floats [{d_sae}]"
        )
    factor = files.tensors.tensor(name)
    if not torch.allclose(factor, torch.ones_like(factor)):
        raise SAEError(
            f"{files.path}: {name} is not 1 everywhere; finetuned scaling is not supported"
        )
    return (name,)


def read_config(path: Path) -> Config:
    """A JSON object from disk. Raises SAEError if it is not one, or is absurdly long."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise SAEError(f"{path}: configuration of more than {MAX_CONFIG_BYTES} bytes")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise SAEError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, SAEError):
            raise
        raise SAEError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise SAEError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return Config(path, values)
