"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`, encoder.weight and W_dec [d_sae, d_in];
top-k of relu, b_dec subtracted. The folder's name is the module (`layers.23.mlp`, `layer_18`),
whose own output is read. Before February 2025 only the run's `config.json`, one folder up, said
whether a dictionary is a transcoder."""

from __future__ import annotations

import re

from sae.errors import SAEError
from sae.files import RUN_CONFIG
from sae.formats.layout import Config, SAEFiles, SAELayout, Stored, choose_hook, read_config
from sae.hook_names import UnknownHookError, parse_hook
from sae.source import ResolvedSAE
from sae.unserved import refuse_transcoder

NAME = "sparsify"

_LAYER = re.compile(r"layers?_(\d+)")


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


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    config = files.config("cfg.json")
    _refuse_transcoder(files, config)
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
    """The module that the folder is named after; None if the name is understood as none."""
    name = _LAYER.sub(r"layers.\1", files.path.parent.name)
    try:
        return str(parse_hook(name))
    except UnknownHookError:
        return None


def _refuse_transcoder(files: SAEFiles, config: Config) -> None:
    if config.flag("transcode", False) or config.flag("skip_connection", False):
        refuse_transcoder(config.path, "transcode or skip_connection is set")
    run = files.path.parent.parent / RUN_CONFIG
    try:
        values = read_config(run).values
    except SAEError:  # there is none, or it is something else's
        return
    training = values.get("sae")
    for section in (values, training if isinstance(training, dict) else {}):
        if section.get("transcode"):
            refuse_transcoder(run, "transcode is set for its run")
