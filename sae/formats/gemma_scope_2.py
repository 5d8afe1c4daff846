"""Gemma Scope 2: `SITE/layer_L_width_W_l0_S/params.safetensors`, JumpReLU, w_enc [d_in, d_sae],
b_dec not subtracted. `config.json` names the modules; where it is absent, the folders do. The case
of the keys varies.

SITE is resid_post, attn_out (the concatenated heads), mlp_out (what is added to the stream) or
transcoder, which reads what the MLP is given, may have an affine skip connection [d_in, d_out], and
writes what the MLP adds. Two more kinds are sets of layers, with one file per layer:

* `clt/width_W_l0_S/params_layer_L.safetensors`, cross-layer transcoders: layer L reads what its MLP
  is given and writes at the MLPs of layers m >= L, w_dec [d_sae, layers, d] with all layers stored.
* `crosscoder/layer_A_B_C_D_width_W_l0_S/params_layer_I.safetensors`, weakly causal crosscoders:
  slot I reads the output of the I-th of the layers that the folder names. That slot alone is
  edited, as an SAE with w_dec[:, I]: the stream carries the edit on to the later layers.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from sae.card import KIND_CLT, KIND_CROSSCODER, KIND_SAE, KIND_TRANSCODER, HookPoint
from sae.errors import SAEError
from sae.files import crosscoder_layers, numbered_layer
from sae.formats.gemma_scope import by_lower_case, jumprelu_tensors
from sae.formats.layout import Config, SAEFiles, SAELayout, Stored
from sae.formats.places import choose_hook, choose_places
from sae.formats.unserved import said_kind
from sae.source import ResolvedSAE

NAME = "gemma_scope_2"

_FOLDERS = {
    "resid_post": "hook_resid_post",
    "attn_out": "attn.hook_z",
    "mlp_out": "hook_mlp_out",
}
_TRANSCODER_PLACES = ("mlp.hook_in", "hook_mlp_out")
_FOLDER = re.compile(r"(?<![a-z])(resid_post|attn_out|mlp_out|transcoder|clt|crosscoder)(?![a-z])")
_SAE_FOLDER = re.compile(r"layer_[\d_]+_width_\w+_l0_\w+|width_\w+_l0_\w+")
_LAYER = re.compile(r"layer_(\d+)")
_KINDS = {"transcoder": KIND_TRANSCODER, "clt": KIND_CLT, "crosscoder": KIND_CROSSCODER}
_SKIP = "affine_skip_connection"


def matches(files: SAEFiles) -> bool:
    matrices = {name for name in files.names if name.lower() in ("w_enc", "w_dec")}
    if files.tensors.container != "safetensors" or not matrices:
        return False
    if matrices <= {"W_enc", "W_dec"}:
        # SAELens spells these names so too: what lies beside the file tells the two apart.
        config = files.configs.get("config.json")
        described = config is not None and "hf_hook_point_in" in config
        placed = _SAE_FOLDER.fullmatch(files.path.parent.name) is not None
        jumprelu = "threshold" in map(str.lower, files.names)
        return "cfg.json" not in files.configs and jumprelu and (described or placed)
    return True


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    config = files.configs.get("config.json")
    names = by_lower_case(files)
    if config is not None and config.get("architecture", "jump_relu") != "jump_relu":
        raise SAEError(
            f"{config.path}: unknown architecture {config.get('architecture')!r:.60}, "
            "expected jump_relu"
        )
    d_in, d_sae = files.shape(names.get("w_enc", "w_enc"), rank=2)
    plain = SAELayout(
        format=NAME,
        architecture="jumprelu",
        kind=_kind(files, ref, config, names),
        hook=HookPoint(0, "hook_resid_post"),  # replaced below, by kind
        d_in=d_in,
        d_sae=d_sae,
        tensors=jumprelu_tensors(names),
        apply_b_dec_to_input=False,
    )
    if plain.kind == KIND_CLT:
        return _clt(files, ref, plain, names)
    if plain.kind == KIND_CROSSCODER:
        return _crosscoder(files, ref, plain, names)
    if plain.kind == KIND_TRANSCODER:
        return _transcoder(files, ref, plain, names)
    path = config.path if config else files.path
    stated = None if config is None else config.words("hf_hook_point_in")
    layer, place = files.search(ref, _LAYER), _FOLDERS.get(files.search(ref, _FOLDER) or "")
    guessed = None if layer is None or place is None else f"blocks.{layer}.{place}"
    return replace(plain, hook=choose_hook(path, ref, stated, guessed))


def _kind(files: SAEFiles, ref: ResolvedSAE, config: Config | None, names: dict[str, str]) -> str:
    said = said_kind(files)
    if config is not None and said is not None and isinstance(config.get("type"), str):
        return said.kind
    by_name = _KINDS.get(files.search(ref, _FOLDER) or "")
    rank = len(files.tensors.headers[names["w_dec"]].shape) if "w_dec" in names else 2
    if by_name in (KIND_CLT, KIND_CROSSCODER) and rank == 3:
        return by_name
    if rank == 3:
        raise SAEError(
            f"{files.path}: {names['w_dec']} has {rank} dimensions, and neither a config.json nor "
            "its folders' names (clt, crosscoder) say what it is"
        )
    is_transcoder = (
        said is not None
        or by_name is not None
        or _SKIP in names
        or ref.reads is not None
        or ref.writes is not None
    )
    return KIND_TRANSCODER if is_transcoder else KIND_SAE


def _transcoder(
    files: SAEFiles, ref: ResolvedSAE, plain: SAELayout, names: dict[str, str]
) -> SAELayout:
    config = files.configs.get("config.json")
    skip = {"W_skip": Stored(names[_SKIP], transposed=True)} if _SKIP in names else {}
    if config is not None and "hf_hook_point_in" in config:
        stated = config.words("hf_hook_point_in"), config.words("hf_hook_point_out")
        reads, hook = choose_places(config.path, ref, *stated)
    else:
        layer = files.search(ref, _LAYER)
        named = layer is not None and files.search(ref, _FOLDER) == "transcoder"
        guessed = [f"blocks.{layer}.{place}" if named else None for place in _TRANSCODER_PLACES]
        reads, hook = choose_places(files.path, ref, *guessed, guessed=True)
    width = files.shape(names.get("w_dec", "w_dec"), rank=2)[1]
    return replace(plain, hook=hook, reads=reads, d_out=width, tensors={**plain.tensors, **skip})


def _clt(files: SAEFiles, ref: ResolvedSAE, plain: SAELayout, names: dict[str, str]) -> SAELayout:
    layer = numbered_layer(files.path.name)
    if layer is None:
        raise SAEError(
            f"{files.path}: the file of a cross-layer transcoder must have its layer in its name, "
            "as params_layer_3.safetensors has"
        )
    _refuse_stated_places(files, ref, "cross-layer transcoder")
    _, layers, width = files.shape(names.get("w_dec", "w_dec"), rank=3)
    if layer >= layers:
        raise SAEError(
            f"{files.path}: its name says layer {layer}, but its decoder has layers 0 to "
            f"{layers - 1}"
        )
    return _of_several(
        plain,
        names,
        reads=HookPoint(layer, "mlp.hook_in"),
        writes=tuple(HookPoint(m, "hook_mlp_out") for m in range(layer, layers)),
        d_out=width,
        stored_places=layers,
        first_place=layer,
    )


def _crosscoder(
    files: SAEFiles, ref: ResolvedSAE, plain: SAELayout, names: dict[str, str]
) -> SAELayout:
    slot = numbered_layer(files.path.name)
    layers = _slot_layers(files, ref)
    _refuse_stated_places(files, ref, "crosscoder")
    _, slots, width = files.shape(names.get("w_dec", "w_dec"), rank=3)
    if slot is None or slot >= len(layers) or slots != len(layers):
        raise SAEError(
            f"{files.path}: a slot of a crosscoder of layers {layers} is named params_layer_0 to "
            f"params_layer_{len(layers) - 1}.safetensors and decodes to {len(layers)} of them, not "
            f"{slots}"
        )
    hook = HookPoint(layers[slot], "hook_resid_post")
    return _of_several(
        plain, names, reads=hook, writes=(hook,), d_out=width, stored_places=slots, first_place=slot
    )


def _of_several(plain: SAELayout, names: dict[str, str], **changes: Any) -> SAELayout:
    """A layer of a set: its bias and skip connection belong to an output that is not edited."""
    tensors = {name: stored for name, stored in plain.tensors.items() if name != "b_dec"}
    unused = tuple(names[name] for name in ("b_dec", _SKIP) if name in names)
    return replace(
        plain,
        hook=changes["writes"][0],
        tensors=tensors,
        constants={"b_dec": 0.0},
        ignored=unused,
        **changes,
    )


def _slot_layers(files: SAEFiles, ref: ResolvedSAE) -> list[int]:
    """The model's layers that the slots of a crosscoder stand for."""
    config = files.configs.get("config.json")
    said = "" if config is None else config.words("hf_hook_point_in") or ""
    found = crosscoder_layers(said)
    for part in (files.path.parent.name, *reversed(ref.source.split("/"))):
        found = found or crosscoder_layers(part)
    if not found:
        raise SAEError(
            f"{files.path}: nothing states which layers this crosscoder reads: keep the folder's "
            "name (layer_5_9_12_15_width_...) or the config.json with hf_hook_point_in"
        )
    return found


def _refuse_stated_places(files: SAEFiles, ref: ResolvedSAE, what: str) -> None:
    if ref.hook is not None or ref.reads is not None or ref.writes is not None:
        raise SAEError(
            f"{files.path}: where a {what} reads and writes is known from its files; state layer= "
            "alone"
        )
