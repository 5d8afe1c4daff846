"""What configurations and tensors say of a dictionary's kind, and the kinds that are not served."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sae.card import KIND_CLT, KIND_CROSSCODER, KIND_SAE, KIND_TRANSCODER
from sae.errors import SAEError
from sae.formats.layout import Config, SAEFiles

#: Keys that say where a dictionary writes, each with those that say where it reads.
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
_CLT: Final = re.compile(r"clt|cross_?layer_?transcoder(?:_set)?")

_CROSS_LAYER_TENSOR: Final = re.compile(r"W_decs\.\d+")
#: Kinds that the name of one tensor gives away.
_BY_TENSOR: Final = {
    "pre_encoder_bias": "an SAE of mlsae, which reads every layer; it cannot be served",
    "W_Q": "a Lorsa (low-rank sparse attention), which attends over the sequence; it cannot be "
    "served",
}


@dataclass(frozen=True)
class Said:
    """A kind that a configuration states, and in which words."""

    kind: str
    how: str


def said_kind(files: SAEFiles) -> Said | None:
    """What the configurations say of the kind; None if they say nothing of any but SAEs."""
    for section in _sections(files):
        for key in _FLAGS:
            if section.get(key):
                return Said(KIND_TRANSCODER, f"{section.path}: {key} is set")
        for key in _KINDS:
            if isinstance(kind := section.get(key), str) and (found := _kind_in(kind)) is not None:
                return Said(found, f"{section.path}: {key} is {kind!r:.60}")
        for writes, reads in _WRITES.items():
            read = next((section.get(key) for key in reads if key in section), None)
            if writes in section and section.get(writes) != read:
                how = f"it reads at {read!s:.60} and writes at {section.get(writes)!s:.60}"
                return Said(KIND_TRANSCODER, f"{section.path}: {how}")
    return None


def refuse_contradiction(files: SAEFiles, format_name: str, kind: str) -> None:
    """Raises SAEError if the configurations say a kind that the format's reader did not find."""
    said = said_kind(files)
    # A layer of one of the others is described as a transcoder, too.
    described = (KIND_TRANSCODER, KIND_CLT, KIND_CROSSCODER)
    if said is None or said.kind == kind or (said.kind == KIND_TRANSCODER and kind in described):
        return
    raise SAEError(
        f"{said.how}, so this is a {said.kind}; as a file of the format {format_name} it can only "
        f"be read as {'an SAE' if kind == KIND_SAE else f'a {kind}'}"
    )


def refuse_unserved(files: SAEFiles) -> None:
    """Raises SAEError, saying what it is, if the files are of a kind that is not served."""
    for name in sorted(files.names):
        if _CROSS_LAYER_TENSOR.fullmatch(name):
            raise SAEError(
                f"{files.path}: this is a cross-layer transcoder of EleutherAI's training code "
                f"(tensor {name}), a format without a reader here"
            )
        if name in _BY_TENSOR:
            raise SAEError(f"{files.path}: this is {_BY_TENSOR[name]}")
    if files.names == {"W", "b_enc", "b_dec"}:
        raise SAEError(
            f"{files.path}: this is an SAE with tied weights (W, b_enc, b_dec), such as Goodfire's "
            "of DeepSeek-R1, whose threshold is not published; it cannot be served"
        )
    if any(name.lower().startswith("w_dec_norm") for name in files.names):
        raise SAEError(
            f"{files.path}: this is a cross-layer transcoder that chooses its top k over all "
            "layers together (W_dec_norm), such as ByteDance's; no layer knows its features before "
            "the last one"
        )
    for config in files.configs.values():
        if config.get("architecture") == "temporal":
            raise SAEError(f"{config.path}: a temporal SAE attends over the sequence")
        if "input_hookpoint" in config and "input_normalize" in config:
            raise SAEError(
                f"{config.path}: this is an SAE of OpenSAE, a format without a reader here"
            )


def _kind_in(kind: str) -> str | None:
    spelled = kind.lower()
    if "crosscoder" in spelled:
        return KIND_CROSSCODER
    if _CLT.fullmatch(spelled):
        return KIND_CLT
    return KIND_TRANSCODER if "transcoder" in spelled else None


def _sections(files: SAEFiles) -> Iterator[Config]:
    for config in files.configs.values():
        yield config
        for key in _SECTIONS:
            if isinstance(values := config.get(key), dict):
                yield Config(config.path, values)
