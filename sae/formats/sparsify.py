"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`, encoder.weight and W_dec [d_sae, d_in];
top-k of relu, b_dec subtracted. The folder's name is the module (`layers.23.mlp`, `layer_18`),
whose own output is read.

A transcoder (`transcode`) reads what the module is given and writes its output; with
`skip_connection` it adds W_skip x. Before February 2025 only the run's `config.json`, one folder
up, said whether a dictionary is one, or its skip connection does, and b_dec was subtracted from its
input as from an SAE's: the library still does so where `transcode` is not set.
"""

from __future__ import annotations

import re

from sae.card import KIND_SAE, KIND_TRANSCODER, HookPoint
from sae.errors import SAEError
from sae.files import RUN_CONFIG
from sae.formats.layout import Config, SAEFiles, SAELayout, Stored, read_config
from sae.formats.places import choose_hook, choose_places
from sae.hook_names import UnknownHookError, parse_hook
from sae.source import ResolvedSAE

NAME = "sparsify"

_SKIP = "W_skip"
# The hook point before a module, by the one behind it.
_INPUTS = {"mlp.hook_out": "mlp.hook_in", "hook_resid_post": "hook_resid_pre"}
_LAYER = re.compile(r"layers?_(\d+)")


def matches(files: SAEFiles) -> bool:
    config = files.configs.get("cfg.json")
    described = (
        config is not None
        and "k" in config
        and ("expansion_factor" in config or "num_latents" in config)
        # SAELens calls the width so, and the encoder below W_enc; its files may state k as well.
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
    activation = config.text("activation", "topk")
    signed = config.flag("signed", False)
    if activation != "topk" or signed:
        raise SAEError(
            f"{config.path}: unknown architecture (activation {activation!r:.60}, signed "
            f"{str(signed).lower()}), expected the top-k of relu (topk, not signed)"
        )
    has_skip = config.flag("skip_connection", False) or _SKIP in files.names
    transcodes = config.flag("transcode", False)
    run_transcodes = "transcode" not in config and _run_transcodes(files)
    asked = ref.reads is not None or ref.writes is not None
    is_transcoder = transcodes or has_skip or run_transcodes or asked
    output = _guess_hook(files)
    if is_transcoder:
        reads, hook = choose_places(files.path, ref, *_ends(output), guessed=True)
    else:
        name = None if output is None else str(output)
        hook = reads = choose_hook(files.path, ref, stated=None, guessed=name)
    return SAELayout(
        format=NAME,
        architecture="topk",
        kind=KIND_TRANSCODER if is_transcoder else KIND_SAE,
        hook=hook,
        reads=reads,
        d_in=config.count("d_in"),
        d_sae=_d_sae(config),
        tensors={
            "W_enc": Stored("encoder.weight"),
            "W_dec": Stored("W_dec"),
            "b_enc": Stored("encoder.bias"),
            "b_dec": Stored("b_dec"),
        }
        | ({_SKIP: Stored(_SKIP)} if has_skip else {}),
        k=config.count("k"),
        apply_b_dec_to_input=not transcodes,
    )


def _d_sae(config: Config) -> int:
    # 0 latents mean: as many as the expansion factor says.
    if config.get("num_latents", 0) != 0:
        return config.count("num_latents")
    return config.count("d_in") * config.count("expansion_factor")


def _guess_hook(files: SAEFiles) -> HookPoint | None:
    """The output of the module that the folder is named after; None if that is not understood."""
    name = _LAYER.sub(r"layers.\1", files.path.parent.name)
    try:
        return parse_hook(name)
    except UnknownHookError:
        return None


def _ends(output: HookPoint | None) -> tuple[str | None, str | None]:
    """Where a transcoder of the module with this output reads and writes."""
    if output is None:
        return None, None
    kind = _INPUTS.get(output.kind)
    return None if kind is None else f"blocks.{output.layer}.{kind}", str(output)


def _run_transcodes(files: SAEFiles) -> bool:
    """Whether the run that a folder is of trained transcoders."""
    try:
        values = read_config(files.path.parent.parent / RUN_CONFIG).values
    except SAEError:  # there is none, or it is something else's
        return False
    training = values.get("sae")
    sections = (values, training if isinstance(training, dict) else {})
    return any(bool(section.get("transcode")) for section in sections)
