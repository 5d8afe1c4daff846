"""llamascopium (lm-saes): `config.json` and safetensors; SAEs and transcoders of Llama Scope 2, and
Llama Scope's of R1-Distill.

Keys are W_E [d, d_sae], W_D [d_sae, d], b_E, b_D, or in older files encoder.* and decoder.* as
torch's linear layers have them; thresholds are stored as logarithms. With `norm_activation`
`dataset-wise` the dictionary was trained on x * s, s = sqrt(d) / average norm. Each hook point has
its own norm, a tensor (`dataset_average_activation_norm.HOOK`) or a number in the configuration.
s is folded in: W_enc*s_in, W_dec/s_out, b_dec/s_out. The threshold applies to scaled activations.

With `sparsity_include_decoder_norm`, lm-saes' default, latents pass by h_i |D_i|, the norm of the
decoder's row as it is stored: a JumpReLU has its threshold divided by it, and a TopK ranks by the
product (and has activations in that unit here).
"""

from __future__ import annotations

import re

from sae.errors import SAEError
from sae.formats.layout import Config, SAEFiles, SAELayout, Stored, linear_layers
from sae.formats.llama_scope import refuse_glu_encoder, scale_of_norm
from sae.formats.places import choose_stated
from sae.source import ResolvedSAE

NAME = "llamascopium"

_NORM = "dataset_average_activation_norm"
_LOG_THRESHOLD = re.compile(r"(?:activation_function\.)?log_jumprelu_threshold")
_PARAMETERS = {
    "W_enc": Stored("W_E", transposed=True),
    "W_dec": Stored("W_D"),
    "b_enc": Stored("b_E"),
    "b_dec": Stored("b_D"),
}
_SIDES = ("in", "out")
_ACTIVATIONS = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk"}


def matches(files: SAEFiles) -> bool:
    if files.tensors.container != "safetensors":
        return False
    return "W_E" in files.names or any(_LOG_THRESHOLD.fullmatch(name) for name in files.names)


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    config = files.config("config.json")
    said = config.text("sae_type", "sae")
    if said not in ("sae", "transcoder"):
        raise SAEError(f"{config.path}: unknown sae_type {said!r:.60}, expected sae or transcoder")
    refuse_glu_encoder(config)
    reads, writes = config.words("hook_point_in"), config.words("hook_point_out")
    kind, read_point, hook = choose_stated(config, ref, reads, writes)
    architecture = _architecture(config)
    tensors = dict(_PARAMETERS) if "W_E" in files.names else linear_layers()
    has_b_dec = config.flag("use_decoder_bias", True)
    if not has_b_dec:
        del tensors["b_dec"]
    if architecture == "jumprelu":
        tensors["threshold"] = _threshold(files)
    d_in, d_sae = _shape(files, tensors["W_enc"])
    by_norm = config.flag("sparsity_include_decoder_norm", True)
    scale, scale_out = _scales(files, ref, config, (reads, writes or reads), d_in)
    return SAELayout(
        format=NAME,
        architecture=architecture,
        kind=kind,
        hook=hook,
        reads=read_point,
        d_in=d_in,
        d_sae=d_sae,
        tensors=tensors,
        constants={} if has_b_dec else {"b_dec": 0.0},
        k=config.count("top_k") if architecture == "topk" else None,
        threshold_over_decoder_norm=architecture == "jumprelu" and by_norm,
        log_threshold=architecture == "jumprelu",
        rescale_acts_by_decoder_norm=architecture == "topk" and by_norm,
        apply_b_dec_to_input=config.flag("apply_decoder_bias_to_pre_encoder", False),
        scale=scale,
        scale_out=scale_out,
        ignored=tuple(name for name in files.names if name.startswith(f"{_NORM}.")),
    )


def _architecture(config: Config) -> str:
    activation = config.text("act_fn", "jumprelu").lower()
    if activation not in _ACTIVATIONS:
        raise SAEError(
            f"{config.path}: unknown act_fn {activation!r:.60}, expected one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[activation]


def _threshold(files: SAEFiles) -> Stored:
    names = [name for name in sorted(files.names) if _LOG_THRESHOLD.fullmatch(name)]
    name = names[0] if names else "log_jumprelu_threshold"
    rank = len(files.tensors.headers[name].shape) if names else 1
    return Stored(name, scalar=rank == 0)


def _shape(files: SAEFiles, W_enc: Stored) -> tuple[int, int]:
    shape = files.shape(W_enc.name, rank=2)
    return (shape[0], shape[1]) if W_enc.transposed else (shape[1], shape[0])


def _scales(
    files: SAEFiles,
    ref: ResolvedSAE,
    config: Config,
    hooks: tuple[str | None, str | None],
    d: int,
) -> tuple[float, float]:
    """s of the input and of the output."""
    mode = config.text("norm_activation", "dataset-wise")
    if mode == "inference":  # folded already
        return 1.0, 1.0
    if mode != "dataset-wise":
        raise SAEError(
            f"{config.path}: unknown norm_activation {mode!r:.60}, expected dataset-wise or "
            "inference"
        )
    found = []
    # An SAE has one side for both.
    for hook, side in zip(hooks, _SIDES if hooks[0] != hooks[1] else ("in", "in"), strict=True):
        scale = _norm_scale(files, config, hook, side, d) or ref.facts.norm_scaling_factor
        if scale is None:
            raise SAEError(
                f"{config.path}: norm_activation is dataset-wise, and the average norm at {hook} "
                f'is stated nowhere; add "{_NORM}": {{"{side}": NORM}} to this file'
            )
        found.append(scale)
    return found[0], found[1]


def _norm_scale(
    files: SAEFiles, config: Config, hook: str | None, side: str, d: int
) -> float | None:
    """s, by the norm that the files state for a hook point; None if they state none."""
    name = f"{_NORM}.{hook}"
    if name in files.names:
        if files.tensors.headers[name].shape not in ((), (1,)):
            raise SAEError(f"{files.path}: {name} must be one number")
        return scale_of_norm(files.path, float(files.tensors.tensor(name)), d)
    norms = config.section(_NORM)
    for key in (hook, side):
        if key is not None and key in norms:
            return scale_of_norm(config.path, norms.number(key), d)
    return None
