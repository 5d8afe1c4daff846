"""SAELens: `cfg.json` and `sae_weights.safetensors`, with W_enc [d_in, d_sae].

Configurations of SAELens 6 keep the hook in `metadata.hook_name`; older ones at the top, as
`hook_name` or `hook_point`, with k in `activation_fn_kwargs` and top-k often hidden in
`activation_fn`. At inference SAELens applies neither `expected_average_only_in` nor
`covariance_whitening`: published weights have them folded in, or the registry states the factor to
fold.
"""

from __future__ import annotations

from sae.architectures import VECTORS
from sae.card import HookPoint
from sae.errors import SAEError
from sae.formats.layout import (
    Config,
    SAEFiles,
    SAELayout,
    Stored,
    check_scaling_factor,
    choose_hook,
    refuse_transcoder,
)
from sae.source import SAEReference

NAME = "sae_lens"

_NORMALIZE = {
    "none": "none",
    "expected_average_only_in": "none",
    "covariance_whitening": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm_rescale",
}
# The bridge of TransformerLens 3 has names of its own for the same places.
_BRIDGE_HOOKS = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
}
_HOOK_KEYS = ("hook_name", "hook_point")
_LAYER_KEYS = ("hook_layer", "hook_point_layer")


def matches(files: SAEFiles) -> bool:
    if files.tensors.container != "safetensors":
        return False
    config = files.configs.get("cfg.json")
    described = config is not None and "d_sae" in config and _is_described(config)
    return described or {"W_enc", "W_dec"} <= files.names


def read(files: SAEFiles, ref: SAEReference) -> SAELayout:
    config = files.config("cfg.json")
    metadata = config.section("metadata")
    architecture, k = _architecture(config)
    normalize, scale = _normalization(config, ref)
    stated = _hook_name(config, metadata)
    hook = choose_hook(config.path, ref, stated, guessed=None)
    _check_layer(config, hook)
    vectors = {name: Stored(name) for name in VECTORS[architecture]}
    d_sae = config.count("d_sae")
    return SAELayout(
        format=NAME,
        architecture=architecture,
        hook=hook,
        d_in=config.count("d_in"),
        d_sae=d_sae,
        tensors={
            "W_enc": Stored("W_enc", transposed=True),
            "W_dec": Stored("W_dec"),
            "b_dec": Stored("b_dec"),
            **vectors,
        },
        k=k,
        normalize_activations=normalize,
        apply_b_dec_to_input=config.flag("apply_b_dec_to_input", True),
        # SAELens knows this only of its top-k classes; the others are saved with it folded in.
        rescale_acts_by_decoder_norm=k is not None
        and config.flag("rescale_acts_by_decoder_norm", False),
        scale=scale,
        ignored=check_scaling_factor(files, "scaling_factor", d_sae),
    )


def _is_described(config: Config) -> bool:
    return any(key in config for key in ("architecture", "metadata", *_HOOK_KEYS))


def _architecture(config: Config) -> tuple[str, int | None]:
    architecture = config.text("architecture", "standard")
    if "transcoder" in architecture or "hook_name_out" in config:
        refuse_transcoder(config.path, f"architecture {architecture}")
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation not in ("relu", "topk"):
        raise SAEError(
            f"{config.path}: unknown activation_fn {activation!r:.60}, expected relu or topk"
        )
    arguments = config.section("activation_fn_kwargs")
    if "topk" in (activation, architecture) and "k" in arguments:
        return "topk", arguments.count("k")
    if architecture not in VECTORS:
        raise SAEError(
            f"{config.path}: unknown architecture {architecture!r:.60}, expected one of "
            f"{', '.join(VECTORS)}"
        )
    return architecture, config.count("k") if architecture in ("topk", "abstopk") else None


def _normalization(config: Config, ref: SAEReference) -> tuple[str, float]:
    """The normalisation applied at inference, and the factor that remains to be folded."""
    stated = ref.normalize_activations or config.get("normalize_activations", "none")
    if isinstance(stated, bool):
        stated = "expected_average_only_in" if stated else "none"
    if not isinstance(stated, str) or stated not in _NORMALIZE:
        raise SAEError(
            f"{config.path}: unknown normalize_activations {stated!r:.60}, expected one of "
            f"{', '.join(_NORMALIZE)}"
        )
    unfolded = stated == "expected_average_only_in" and ref.norm_scaling_factor is not None
    scale = ref.norm_scaling_factor if unfolded else None
    return _NORMALIZE[stated], 1.0 if scale is None else scale


def _hook_name(config: Config, metadata: Config) -> str | None:
    for section in (metadata, config):
        for key in _HOOK_KEYS:
            if key in section:
                name = section.text(key)
                blocks, layer, place = (*name.split(".", 2), "", "")[:3]
                return (
                    f"{blocks}.{layer}.{_BRIDGE_HOOKS[place]}" if place in _BRIDGE_HOOKS else name
                )
    return None


def _check_layer(config: Config, hook: HookPoint) -> None:
    for key in _LAYER_KEYS:
        if key in config and config.get(key) != hook.layer:
            raise SAEError(f"{config.path}: {key} is {config.get(key)!r:.20}, the hook is {hook}")
