"""Dictionaries of kinds that are not served, told by their configurations and their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from sae.errors import SAEError
from sae.formats.layout import Config, SAEFiles
from sae.unserved import CROSS_LAYER, CROSSCODER, TRANSCODER, refuse_transcoder

#: Where a configuration says what is written, and where beside it what is read.
_WRITES: Final = {
    "hook_name_out": ("hook_name", "hook_point"),
    "hook_point_out": ("hook_point_in", "hook_point", "hook_name"),
    "out_hook_point": ("hook_point", "hook_name"),
    "output_hook_point": ("input_hook_point", "hook_point", "hook_name"),
    "hf_hook_name_out": ("hf_hook_name",),
    "hf_hook_point_out": ("hf_hook_point_in",),
    "feature_output_hook": ("feature_input_hook",),
    "output_hookpoint": ("input_hookpoint",),
}
_FLAGS: Final = ("is_transcoder", "transcode")
_KINDS: Final = ("architecture", "type", "sae_type", "model_kind", "kind")
_SECTIONS: Final = ("metadata", "trainer", "sae", "cfg")

_CROSS_LAYER_TENSOR: Final = re.compile(r"W_(?:enc|dec)_\d+|W_decs\.\d+")
_PER_LAYER_FILE: Final = re.compile(r"layer_\d+\.safetensors")
_SKIPS: Final = ("W_skip", "affine_skip_connection")
#: What else is told by one of its tensors.
_BY_TENSOR: Final = {
    "log_jumprelu_threshold": "an SAE of Llama Scope R1-Distill (encoder, decoder and "
    "log_jumprelu_threshold), a format that cannot be served so far",
    "W_E": "a dictionary of llamascopium (W_E and W_D), a format that cannot be served so far",
    "pre_encoder_bias": "an SAE of mlsae, which reads every layer; it cannot be served",
    "W_Q": "a Lorsa (low-rank sparse attention), which attends over the sequence; it cannot be "
    "served",
}


def refuse_unserved(files: SAEFiles) -> None:
    """Raises SAEError, saying what it is, if the files are of a kind that is not served."""
    for section in _sections(files):
        _refuse_kind(section)
    names = {name.lower(): name for name in files.names}
    for skip in _SKIPS:
        if skip.lower() in names:
            refuse_transcoder(files.path, f"tensor {names[skip.lower()]}")
    for name in sorted(files.names):
        if _CROSS_LAYER_TENSOR.fullmatch(name):
            raise SAEError(
                f"{files.path}: this is a cross-layer transcoder (tensor {name}), {CROSS_LAYER}"
            )
        if name in _BY_TENSOR:
            raise SAEError(f"{files.path}: this is {_BY_TENSOR[name]}")
    for matrix in ("w_enc", "w_dec"):
        shape = files.tensors.headers[names[matrix]].shape if matrix in names else ()
        if len(shape) > 2:
            raise SAEError(
                f"{files.path}: this is a crosscoder or a cross-layer transcoder "
                f"({names[matrix]} is {list(shape)}), {CROSSCODER}"
            )
    if files.names == {"W", "b_enc", "b_dec"}:
        raise SAEError(
            f"{files.path}: this is an SAE with tied weights (W, b_enc, b_dec), as Goodfire's of "
            "DeepSeek-R1, whose threshold is not published; it cannot be served"
        )
    if _is_circuit_tracer(files):
        raise SAEError(
            f"{files.path}: this is a transcoder of circuit-tracer (W_enc and W_dec of one shape, "
            f"without a cfg.json), {TRANSCODER}"
        )


def _sections(files: SAEFiles) -> Iterator[Config]:
    for config in files.configs.values():
        yield config
        for key in _SECTIONS:
            if isinstance(values := config.get(key), dict):
                yield Config(config.path, values)


def _refuse_kind(section: Config) -> None:
    for key in _FLAGS:
        if section.get(key):
            refuse_transcoder(section.path, f"{key} is set")
    for key in _KINDS:
        kind: Any = section.get(key)
        if not isinstance(kind, str):
            continue
        if "crosscoder" in kind.lower():
            raise SAEError(f"{section.path}: this is a crosscoder ({key} {kind!r}), {CROSSCODER}")
        if re.fullmatch(r"clt|cross_?layer_?transcoder", kind.lower()):
            raise SAEError(
                f"{section.path}: this is a cross-layer transcoder ({key} {kind!r}), {CROSS_LAYER}"
            )
        if "transcoder" in kind.lower():
            refuse_transcoder(section.path, f"{key} {kind!r:.60}")
    for writes, reads in _WRITES.items():
        read = next((section.get(key) for key in reads if key in section), None)
        if writes in section and section.get(writes) != read:
            refuse_transcoder(
                section.path, f"it reads at {read!s:.60} and writes at {section.get(writes)!s:.60}"
            )


def _is_circuit_tracer(files: SAEFiles) -> bool:
    """Its sets keep one row per latent in W_enc too; what describes them lies in a config.yaml."""
    if files.configs or not {"W_enc", "W_dec"} <= files.names:
        return False
    if files.tensors.container != "safetensors":
        return False
    shapes = {files.tensors.headers[name].shape for name in ("W_enc", "W_dec")}
    named = _PER_LAYER_FILE.fullmatch(files.path.name) is not None
    return len(shapes) == 1 or named or "activation_function.threshold" in files.names
