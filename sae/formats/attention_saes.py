"""Kissane and Krzyzanowski's SAEs of GPT-2's attention: `NAME.pt` and `NAME_cfg.json`, W_enc
[d_in, d_sae], W_dec [d_sae, d_in]; relu of the concatenated heads (hook_z), b_dec subtracted."""

from __future__ import annotations

from sae.files import OWN_CONFIG
from sae.formats.layout import SAEFiles, SAELayout, Stored
from sae.formats.places import choose_hook
from sae.source import ResolvedSAE

NAME = "attention_saes"


def matches(files: SAEFiles) -> bool:
    config = files.configs.get(OWN_CONFIG)
    return files.tensors.container == "torch" and config is not None and "act_name" in config


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    config = files.config(OWN_CONFIG)
    return SAELayout(
        format=NAME,
        architecture="standard",
        hook=choose_hook(config.path, ref, config.words("act_name"), guessed=None),
        d_in=config.count("act_size"),
        d_sae=config.count("dict_size"),
        tensors={
            "W_enc": Stored("W_enc", transposed=True),
            "W_dec": Stored("W_dec"),
            "b_enc": Stored("b_enc"),
            "b_dec": Stored("b_dec"),
        },
    )
