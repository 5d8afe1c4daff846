"""SAELens: `cfg.json` and `sae_weights.safetensors`, with W_enc [d_in, d_sae].

Configurations of SAELens 6 keep the hook in `metadata.hook_name`; older ones at the top, as
`hook_name` or `hook_point`, with k in `activation_fn_kwargs` and top-k often hidden in
`activation_fn`. At inference SAELens applies neither `expected_average_only_in` nor
`covariance_whitening`: published weights have them folded in, or the registry states the factor to
fold, or, for a checkpoint of a training run, `activation_scaler.json` beside it does.

With `center_writing_weights` an SAE was trained on a model whose weights TransformerLens had
centered, and whose stream has no mean over d_in. It reads x - mean(x) here. TransformerLens centers
only models with LayerNorm, whatever is asked of it.
"""

from __future__ import annotations

import re

from sae import registry
from sae.architectures import VECTORS
from sae.card import HookPoint
from sae.errors import SAEError
from sae.files import SCALER_NAME
from sae.formats.layout import (
    Config,
    SAEFiles,
    SAELayout,
    Stored,
    check_scaling_factor,
    choose_hook,
)
from sae.source import ResolvedSAE

NAME = "sae_lens"

_NORMALIZE = {
    "none": "none",
    "expected_average_only_in": "none",
    "covariance_whitening": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm_rescale",
}
# Models with RMSNorm, by how their names begin.
_RMS_NORM = re.compile(
    r"(?:meta-)?(?:llama|codellama|tinyllama|gemma|mistral|mixtral|qwen|smollm|deepseek|yi-|phi-3|"
    r"phi-4|olmo-2|gpt-oss|granite)",
    re.IGNORECASE,
)
# Trained over whole batches; their inference form is a JumpReLU SAE.
_TRAINED_OVER_BATCHES = ("batchtopk", "matryoshka_batchtopk", "batch_topk")
_HOOK_KEYS = ("hook_name", "hook_point")
_LAYER_KEYS = ("hook_layer", "hook_point_layer")
# Beyond these, folding a factor would leave float32.
MIN_FACTOR = 1e-9
MAX_FACTOR = 1e9


def matches(files: SAEFiles) -> bool:
    if files.tensors.container != "safetensors":
        return False
    config = files.configs.get("cfg.json")
    described = config is not None and "d_sae" in config and _is_described(config)
    return described or {"W_enc", "W_dec"} <= files.names


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    config = files.config("cfg.json")
    metadata = config.section("metadata")
    architecture, k = _architecture(config)
    facts, remarks = _registry_facts(config, metadata, ref)
    normalize, scale = _normalization(files, config, facts)
    if scale == 1.0 and normalize == "none":
        remarks += _unknown_folding(config)
    stated = _hook_name(config, metadata)
    hook = choose_hook(config.path, ref, stated, guessed=None)
    _check_layer(config, metadata, hook)
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
        centered=_is_centered(config, metadata, facts, normalize),
        remarks=remarks,
    )


def _is_described(config: Config) -> bool:
    return any(key in config for key in ("architecture", "metadata", *_HOOK_KEYS))


def _architecture(config: Config) -> tuple[str, int | None]:
    architecture = config.text("architecture", "standard")
    if architecture in _TRAINED_OVER_BATCHES:
        raise SAEError(
            f"{config.path}: unknown architecture {architecture!r}: this is a training checkpoint, "
            "which chooses its top k over a whole batch; save it for inference, as a JumpReLU "
            "SAE, with SAELens: TrainingSAE.load_from_disk(FOLDER).save_inference_model(NEW_FOLDER)"
        )
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    spelled = activation.lower() if isinstance(activation, str) else activation
    known = ("relu", architecture) if architecture == "abstopk" else ("relu", "topk", architecture)
    if spelled not in known:
        raise SAEError(
            f"{config.path}: unknown activation_fn {activation!r:.60} beside architecture "
            f"{architecture!r:.60}, expected relu or topk"
        )
    arguments = config.section("activation_fn_kwargs")
    if "topk" in (spelled, architecture):
        return "topk", _k(config, arguments)
    if architecture not in VECTORS:
        raise SAEError(
            f"{config.path}: unknown architecture {architecture!r:.60}, expected one of "
            f"{', '.join(VECTORS)}"
        )
    return architecture, _k(config, arguments) if architecture == "abstopk" else None


def _k(config: Config, arguments: Config) -> int:
    if "k" in arguments:
        return arguments.count("k")
    if "k" not in config:
        raise SAEError(
            f"{config.path}: the k of its top k is stated nowhere; add it to this file, as "
            '"k": 32 with the k that it was trained with'
        )
    return config.count("k")


def _registry_facts(
    config: Config, metadata: Config, ref: ResolvedSAE
) -> tuple[registry.RegistryFacts, tuple[str, ...]]:
    """What the registry says of this SAE, and what it may say of it that cannot be known."""
    if ref.facts != registry.RegistryFacts() or _is_of_sae_lens_6(config, metadata):
        return ref.facts, ()
    model = metadata.get("model_name", config.get("model_name"))
    hook = _hook_name(config, metadata)
    entry = registry.alike(model, hook) if isinstance(model, str) and hook is not None else None
    if entry is None:
        return ref.facts, ()
    return ref.facts, (
        f"{config.path}: SAELens' registry changes how its {entry.release} is read, which is of "
        f"this model and hook point; if this is a copy of it, name it as "
        f"sae_lens://{entry.release}/{entry.sae_id}",
    )


def _is_of_sae_lens_6(config: Config, metadata: Config) -> bool:
    """Such configurations say themselves what older ones leave to the registry."""
    version = metadata.get("sae_lens_version", config.get("sae_lens_version"))
    found = re.match(r"(\d+)\.", version) if isinstance(version, str) else None
    return found is not None and int(found[1]) >= 6


def _normalization(
    files: SAEFiles, config: Config, facts: registry.RegistryFacts
) -> tuple[str, float]:
    """The normalisation applied at inference, and the factor that remains to be folded."""
    stated = _stated_normalization(config, facts)
    scaler = files.configs.get(SCALER_NAME)
    if scaler is not None:
        if scaler.flag("has_whitening", False):
            raise SAEError(
                f"{scaler.path}: this checkpoint reads whitened activations, and the whitening is "
                "not folded into its weights; fold it with SAELens' fold_activation_whitening, or "
                "take what the finished training saved"
            )
        if "scaling_factor" in scaler:
            return _NORMALIZE[stated], _unfolded_factor(scaler, stated, facts)
    unfolded = stated == "expected_average_only_in" and facts.norm_scaling_factor is not None
    return _NORMALIZE[stated], (facts.norm_scaling_factor or 1.0) if unfolded else 1.0


def _stated_normalization(config: Config, facts: registry.RegistryFacts) -> str:
    stated = facts.normalize_activations or config.get("normalize_activations", "none")
    if isinstance(stated, bool):
        stated = "expected_average_only_in" if stated else "none"
    if not isinstance(stated, str) or stated not in _NORMALIZE:
        raise SAEError(
            f"{config.path}: unknown normalize_activations {stated!r:.60}, expected one of "
            f"{', '.join(_NORMALIZE)}"
        )
    return stated


def _unfolded_factor(scaler: Config, stated: str, facts: registry.RegistryFacts) -> float:
    """A checkpoint's own factor. Raises SAEError if the configuration speaks against it."""
    factor = scaler.number("scaling_factor")
    if not MIN_FACTOR <= factor <= MAX_FACTOR:
        raise SAEError(
            f"{scaler.path}: scaling_factor must be from {MIN_FACTOR} to {MAX_FACTOR}, got {factor}"
        )
    if stated != "expected_average_only_in":
        raise SAEError(
            f"{scaler.path}: scaling_factor is {factor}, and cfg.json says normalize_activations "
            f"{stated}: whether the factor is folded into the weights is not known; set it to null "
            "if it is, or normalize_activations to expected_average_only_in if it is not"
        )
    if facts.norm_scaling_factor not in (None, factor):
        raise SAEError(
            f"{scaler.path}: scaling_factor is {factor}, SAELens' registry says "
            f"{facts.norm_scaling_factor}"
        )
    return factor


def _unknown_folding(config: Config) -> tuple[str, ...]:
    """A remark where weights may lack a fold that nothing beside them states."""
    stated = config.get("normalize_activations")
    if stated not in ("expected_average_only_in", "covariance_whitening", True):
        return ()
    missing = "" if registry.is_installed() else ", and SAELens' registry is not installed"
    return (
        f"{config.path}: trained with normalize_activations {stated}, and nothing says whether "
        f"that is folded into the weights{missing}; taken as folded, as SAELens does",
    )


def _is_centered(
    config: Config, metadata: Config, facts: registry.RegistryFacts, normalize: str
) -> bool:
    stated = [
        section.section("model_from_pretrained_kwargs").flag("center_writing_weights", False)
        for section in (metadata, config)
    ]
    name = metadata.get("model_name", config.get("model_name", facts.model))
    rms_norm = isinstance(name, str) and _RMS_NORM.match(name.rpartition("/")[2]) is not None
    if rms_norm or not (any(stated) or facts.center_writing_weights):
        return False
    if normalize == "constant_norm_rescale":
        raise SAEError(
            f"{config.path}: center_writing_weights with normalize_activations {normalize} is not "
            "supported: the norm of a stream without its mean is not that of the model's"
        )
    return normalize == "none"  # layer_norm takes the mean out itself


def _hook_name(config: Config, metadata: Config) -> str | None:
    for section in (metadata, config):
        for key in _HOOK_KEYS:
            if key in section:
                return section.words(key)
    return None


def _check_layer(config: Config, metadata: Config, hook: HookPoint) -> None:
    """Refuse a layer beside the hook's name that is another one; what is none says nothing."""
    for section in (metadata, config):
        for key in _LAYER_KEYS:
            stated = section.get(key)
            digits = isinstance(stated, int | str) and re.fullmatch(r"\d+", str(stated), re.ASCII)
            if digits and not isinstance(stated, bool) and str(hook.layer) != str(stated):
                raise SAEError(f"{config.path}: {key} is {stated!r:.20}, the hook is {hook}")
