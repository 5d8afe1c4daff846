"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`, encoder.weight and W_dec [d_sae, d_in];
top-k of relu, b_dec subtracted. The folder's name is the module (`layers.23.mlp`, `layer_18`)."""

from __future__ import annotations

import re

from sae.errors import SAEError
from sae.formats.layout import Config, SAEFiles, SAELayout, Stored, choose_hook, refuse_transcoder
from sae.source import SAEReference

NAME = "sparsify"

_MODULE = re.compile(r"(?:\w+\.)*(?:layers?|h)[._](\d+)(?:\.(\w+))?")
_SUBMODULES = {
    None: "hook_resid_post",
    "mlp": "hook_mlp_out",
    "attn": "hook_attn_out",
    "attention": "hook_attn_out",
    "self_attn": "hook_attn_out",
}


def matches(files: SAEFiles) -> bool:
    config = files.configs.get("cfg.json")
    described = (
        config is not None
        and "k" in config
        and ("expansion_factor" in config or "num_latents" in config)
        # SAELens' own name of the width, and of the encoder below: its files may state these too.
        and "d_sae" not in config
    )
    named = {"encoder.weight", "W_dec"} <= files.names
    return (
        files.tensors.container == "safetensors"
        and "W_enc" not in files.names
        and (described or named)
    )


def read(files: SAEFiles, ref: SAEReference) -> SAELayout:
    config = files.config("cfg.json")
    if config.flag("transcode", False) or "W_skip" in files.names:
        refuse_transcoder(config.path, "transcode or skip_connection is set")
    activation = config.text("activation", "topk")
    if activation != "topk" or config.flag("signed", False):
        raise SAEError(f"{config.path}: unknown architecture, expected the top-k of relu")
    return SAELayout(
        format=NAME,
        architecture="topk",
        hook=choose_hook(files.path, ref, stated=None, guessed=_guess_hook(files)),
        d_in=config.count("d_in"),
        d_sae=_d_sae(config),
        tensors={
            "W_enc": Stored("encoder.weight"),
            "W_dec": Stored("W_dec"),
            "b_enc": Stored("encoder.bias"),
            "b_dec": Stored("b_dec"),
        },
        k=config.count("k"),
    )


def _d_sae(config: Config) -> int:
    # 0 latents mean: as many as the expansion factor says.
    if config.get("num_latents", 0) != 0:
        return config.count("num_latents")
    return config.count("d_in") * config.count("expansion_factor")


def _guess_hook(files: SAEFiles) -> str | None:
    match = _MODULE.fullmatch(files.path.parent.name)
    if match is None or match.group(2) not in _SUBMODULES:
        return None
    return f"blocks.{match.group(1)}.{_SUBMODULES[match.group(2)]}"
