"""SAELens: `cfg.json` and `sae_weights.safetensors`, with W_enc [d_in, d_sae].

Configurations of SAELens 6 keep the hook in `metadata.hook_name`; older ones at the top, as
`hook_name` or `hook_point`, with k in `activation_fn_kwargs` and top-k often hidden in
`activation_fn`. At inference SAELens applies neither `expected_average_only_in` nor
`covariance_whitening`: published weights have them folded in, or the registry states the factor to
fold, or, for a checkpoint of a training run, `activation_scaler.json` beside it does.

Its transcoders are named by their architecture (`jumprelu_skip_transcoder`), read at
`metadata.hook_name` and write at `metadata.hook_name_out`. If `hf_hook_name`, the name of Hugging
Face's module, is stated beside it, it takes precedence: `blocks.L.hook_mlp_in` in SAELens' Gemma
Scope 2 is not TransformerLens' hook point of that name. SAELens loads models without folding the
norms' gains unless `fold_ln` asks for it, and for a LayerNorm that is not folded, TransformerLens'
`ln2.hook_normalized` is its output with gain and bias.

With `center_writing_weights` an SAE was trained on a model whose weights TransformerLens had
centred, and whose stream has no mean over d_in. It reads x - mean(x) here. TransformerLens centres
only models with LayerNorm, whatever it is asked to do.
"""

from __future__ import annotations

import re

from sae import registry
from sae.architectures import VECTORS
from sae.card import KIND_SAE, KIND_TRANSCODER, HookPoint
from sae.errors import SAEError
from sae.files import SCALER_NAME
from sae.formats.layout import Config, SAEFiles, SAELayout, Stored, check_scaling_factor
from sae.formats.places import choose_hook, choose_places
from sae.source import ResolvedSAE

NAME = "sae_lens"

_ARCHITECTURES = ("standard", "jumprelu", "gated", "topk", "abstopk")
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
# Models with LayerNorm.
_LAYER_NORM = re.compile(r"(?:gpt2|gpt-2|distilgpt2|gpt-neo|pythia|opt-|bloom|gelu-|solu-)", re.I)
# A transcoder's architecture is that of its encoder and decoder, perhaps with a skip connection.
_TRANSCODER = re.compile(r"(?P<encoder>|jumprelu_)(?P<skip>|skip_)transcoder")
# The stream, and what is added to it: with centred weights these have no mean.
_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
_ADDED = ("hook_attn_out", "hook_mlp_out", "attn.hook_out", "mlp.hook_out")
# Trained over whole batches; their inference form is a JumpReLU SAE.
_TRAINED_OVER_BATCHES = ("batchtopk", "matryoshka_batchtopk", "batch_topk")
_HOOK_KEYS = ("hook_name", "hook_point")
_LAYER_KEYS = ("hook_layer", "hook_point_layer")
# Beyond these, folding a factor would leave the range of float32.
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
    transcoder = _TRANSCODER.fullmatch(config.text("architecture", "standard"))
    architecture, k = _architecture(config, transcoder)
    facts, remarks = _registry_facts(config, metadata, ref)
    normalize, scale = _normalization(files, config, facts)
    if scale == 1.0 and normalize == "none":
        remarks += _unknown_folding(config)
    if transcoder is None:
        hook = reads = choose_hook(config.path, ref, _hook_name(config, metadata), guessed=None)
    else:
        reads, hook = _transcoder_places(config, metadata, ref)
        _check_transcoder(config, normalize)
    _check_layer(config, metadata, reads)
    d_sae = config.count("d_sae")
    tensors = {
        "W_enc": Stored("W_enc", transposed=True),
        "W_dec": Stored("W_dec"),
        "b_dec": Stored("b_dec"),
        **{name: Stored(name) for name in VECTORS[architecture]},
    }
    if transcoder is not None and transcoder["skip"]:
        tensors["W_skip"] = Stored("W_skip")
    return SAELayout(
        format=NAME,
        architecture=architecture,
        kind=KIND_SAE if transcoder is None else KIND_TRANSCODER,
        hook=hook,
        reads=reads,
        d_in=config.count("d_in"),
        d_out=None if transcoder is None else config.count("d_out"),
        d_sae=d_sae,
        tensors=tensors,
        k=k,
        normalize_activations=normalize,
        apply_b_dec_to_input=config.flag("apply_b_dec_to_input", transcoder is None),
        # In SAELens only top-k classes have this option; the others are saved with it folded in.
        rescale_acts_by_decoder_norm=k is not None
        and config.flag("rescale_acts_by_decoder_norm", False),
        scale=scale,
        # Of a transcoder only the input is scaled.
        scale_out=None if transcoder is None else 1.0,
        ignored=check_scaling_factor(files, "scaling_factor", d_sae),
        centered=_is_centered(config, metadata, facts, normalize, reads),
        remarks=remarks,
    )


def _transcoder_places(
    config: Config, metadata: Config, ref: ResolvedSAE
) -> tuple[HookPoint, HookPoint]:
    reads = _word(metadata, config, ("hf_hook_name", *_HOOK_KEYS))
    writes = _word(metadata, config, ("hf_hook_name_out", "hook_name_out"))
    read_point, write_point = choose_places(config.path, ref, reads, writes)
    kwargs = metadata.section("model_from_pretrained_kwargs")
    model = metadata.get("model_name", config.get("model_name"))
    if (
        read_point.kind == "ln2.hook_normalized"
        and isinstance(model, str)
        and _LAYER_NORM.match(model.rpartition("/")[2])
        and not kwargs.flag("fold_ln", False)
    ):
        read_point = HookPoint(read_point.layer, "mlp.hook_in")
    return read_point, write_point


def _check_transcoder(config: Config, normalize: str) -> None:
    """Refuse options that no transcoder of SAELens has, and a normalization of the input.

    The output stands at another place, where the normalization could not be undone.
    """
    if config.flag("apply_b_dec_to_input", False):
        raise SAEError(
            f"{config.path}: apply_b_dec_to_input is set, which SAELens has no transcoder for"
        )
    if normalize != "none":
        raise SAEError(
            f"{config.path}: a transcoder with normalize_activations {normalize} cannot be served: "
            "its output is not scaled back"
        )


def _is_described(config: Config) -> bool:
    return any(key in config for key in ("architecture", "metadata", *_HOOK_KEYS))


def _architecture(config: Config, transcoder: re.Match[str] | None) -> tuple[str, int | None]:
    if transcoder is not None:
        return "jumprelu" if transcoder["encoder"] else "standard", None
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
    if architecture not in _ARCHITECTURES:
        raise SAEError(
            f"{config.path}: unknown architecture {architecture!r:.60}, expected one of "
            f"{', '.join(_ARCHITECTURES)}"
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
    """What the registry says of this SAE, and a remark if an entry may be of it or may not."""
    if ref.facts != registry.RegistryFacts() or _is_of_sae_lens_6(config, metadata):
        return ref.facts, ()
    model = metadata.get("model_name", config.get("model_name"))
    hook = _hook_name(config, metadata)
    entry = registry.alike(model, hook) if isinstance(model, str) and hook is not None else None
    if entry is None:
        return ref.facts, ()
    return ref.facts, (
        f"{config.path}: SAELens' registry changes how its {entry.release} is read, which has this "
        f"model and hook point; if this is a copy of it, name it as "
        f"sae_lens://{entry.release}/{entry.sae_id}",
    )


def _is_of_sae_lens_6(config: Config, metadata: Config) -> bool:
    """Whether SAELens 6 wrote it: such files state what older ones leave to the registry."""
    version = metadata.get("sae_lens_version", config.get("sae_lens_version"))
    found = re.match(r"(\d+)\.", version) if isinstance(version, str) else None
    return found is not None and int(found[1]) >= 6


def _normalization(
    files: SAEFiles, config: Config, facts: registry.RegistryFacts
) -> tuple[str, float]:
    """The normalization applied at inference, and the factor that remains to be folded."""
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
    """A remark if nothing says whether a normalization is folded into the weights."""
    stated = config.get("normalize_activations")
    if stated not in ("expected_average_only_in", "covariance_whitening", True):
        return ()
    missing = "" if registry.is_installed() else ", and SAELens' registry is not installed"
    return (
        f"{config.path}: trained with normalize_activations {stated}, and nothing says whether "
        f"that is folded into the weights{missing}; it is taken as folded, as in SAELens",
    )


def _is_centered(
    config: Config,
    metadata: Config,
    facts: registry.RegistryFacts,
    normalize: str,
    reads: HookPoint,
) -> bool:
    if reads.kind not in (*_STREAM, *_ADDED):  # heads, and what norms make of the stream
        return False
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
    return _word(metadata, config, _HOOK_KEYS)


def _word(metadata: Config, config: Config, keys: tuple[str, ...]) -> str | None:
    """What the first of the keys says, in words; in the metadata or, in older files, at the top."""
    for key in keys:
        for section in (metadata, config):
            if key in section:
                return section.words(key)
    return None


def _check_layer(config: Config, metadata: Config, hook: HookPoint) -> None:
    """Refuse a stated layer that is not the hook's; a value that is no layer is ignored."""
    for section in (metadata, config):
        for key in _LAYER_KEYS:
            stated = section.get(key)
            digits = isinstance(stated, int | str) and re.fullmatch(r"\d+", str(stated), re.ASCII)
            if digits and not isinstance(stated, bool) and str(hook.layer) != str(stated):
                raise SAEError(f"{config.path}: {key} is {stated!r:.20}, the hook is {hook}")
