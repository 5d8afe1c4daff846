"""Gemma Scope 2: `resid_post/layer_L_width_W_l0_S/params.safetensors`, JumpReLU, w_enc
[d_in, d_sae], b_dec not subtracted. `config.json` names the module; where it is absent, the
folders do. The case of the keys varies."""

from __future__ import annotations

import re

from sae.errors import SAEError
from sae.formats.gemma_scope import by_lower_case, jumprelu_tensors
from sae.formats.layout import Config, SAEFiles, SAELayout, choose_hook
from sae.source import ResolvedSAE
from sae.unserved import CROSSCODER, refuse_transcoder

NAME = "gemma_scope_2"

_FOLDERS = {
    "resid_post": "hook_resid_post",
    "attn_out": "attn.hook_z",
    "mlp_out": "hook_mlp_out",
}
_SEVERAL_LAYERS = re.compile(r"\.\{.+\}\.")
_FOLDER = re.compile(r"(?<![a-z])(resid_post|attn_out|mlp_out|transcoder|clt)(?![a-z])")
_SAE_FOLDER = re.compile(r"layer_\d+_width_\w+_l0_\w+")


def matches(files: SAEFiles) -> bool:
    matrices = {name for name in files.names if name.lower() in ("w_enc", "w_dec")}
    if files.tensors.container != "safetensors" or not matrices:
        return False
    if matrices <= {"W_enc", "W_dec"}:
        # Spelled as SAELens spells them: what lies around them tells the two apart.
        config = files.configs.get("config.json")
        described = config is not None and "hf_hook_point_in" in config
        placed = _SAE_FOLDER.fullmatch(files.path.parent.name) is not None
        jumprelu = "threshold" in map(str.lower, files.names)
        return "cfg.json" not in files.configs and jumprelu and (described or placed)
    return True


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    config = files.configs.get("config.json")
    names = by_lower_case(files)
    _refuse_several_layers(files, ref, config)
    if config is not None and config.get("architecture", "jump_relu") != "jump_relu":
        raise SAEError(
            f"{config.path}: unknown architecture {config.get('architecture')!r:.60}, "
            "expected jump_relu"
        )
    d_in, d_sae = files.shape(names.get("w_enc", "w_enc"), rank=2)
    stated = None if config is None else config.words("hf_hook_point_in")
    return SAELayout(
        format=NAME,
        architecture="jumprelu",
        hook=choose_hook(
            config.path if config else files.path, ref, stated, guessed=_guess_hook(files, ref)
        ),
        d_in=d_in,
        d_sae=d_sae,
        tensors=jumprelu_tensors(names),
        apply_b_dec_to_input=False,
    )


def _refuse_several_layers(files: SAEFiles, ref: ResolvedSAE, config: Config | None) -> None:
    if config is not None and _SEVERAL_LAYERS.search(str(config.get("hf_hook_point_in", ""))):
        raise SAEError(
            f"{config.path}: this is a {config.get('type', 'crosscoder')!s:.40} "
            f"({config.get('hf_hook_point_in')!s:.80}), {CROSSCODER}"
        )
    if config is None and files.search(ref, _FOLDER) in ("transcoder", "clt"):
        refuse_transcoder(files.path, "by its folder's name")


def _guess_hook(files: SAEFiles, ref: ResolvedSAE) -> str | None:
    site = files.search(ref, _FOLDER)
    layer = files.search(ref, re.compile(r"layer_(\d+)"))
    if site not in _FOLDERS or layer is None:
        return None
    return f"blocks.{layer}.{_FOLDERS[site]}"
