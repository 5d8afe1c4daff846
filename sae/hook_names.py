"""The names by which files and users call a hook point, brought to the field's own.

Three vocabularies occur: TransformerLens' (`blocks.3.hook_resid_post`), that of its bridge
(`blocks.3.hook_out`, `blocks.3.mlp.hook_out`) and the names of Hugging Face's modules
(`model.layers.3`, `model.layers.3.mlp`), where a module's name means that module's output.

Where a layer normalizes or scales a branch before it adds it to the stream (Gemma 2 and 3), the
module's own output (`mlp.hook_out`, `attn.hook_out`) and what is added (`hook_mlp_out`,
`hook_attn_out`) are two tensors; in most models they are one.
"""

from __future__ import annotations

import re
from typing import Final

from sae.card import HOOK_KINDS, HookPoint
from sae.errors import SAEError

#: What to write if a hook point is not understood.
EXPECTED: Final = (
    f"blocks.LAYER.KIND with KIND one of {', '.join(HOOK_KINDS)}, or the name of a module "
    "(model.layers.LAYER, model.layers.LAYER.mlp, model.layers.LAYER.self_attn)"
)

#: What TransformerLens' bridge calls the places, beside the names that are kinds already. The
#: post-norms are what its own `hook_mlp_out` and `hook_attn_out` stand for if they exist.
_BRIDGE: Final = {
    "hook_in": "hook_resid_pre",
    "ln1.hook_in": "hook_resid_pre",
    "ln2.hook_in": "hook_resid_mid",
    "hook_out": "hook_resid_post",
    "ln1_post.hook_out": "hook_attn_out",
    "ln2_post.hook_out": "hook_mlp_out",
    "ln2.hook_out": "mlp.hook_in",
    "hook_z": "attn.hook_z",
    # A copy of the stream that TransformerLens gives to the norm before the MLP.
    "hook_mlp_in": "hook_resid_mid",
}
#: Real places at which nothing is served: an SAE of one of them belongs nowhere else.
_UNSERVED: Final = {
    "attn.hook_q": "attention's queries are",
    "attn.hook_k": "attention's keys are",
    "attn.hook_v": "attention's values are",
    "hook_attn_in": "the input of attention is",
    "attn.hook_in": "the input of attention is",
    "mlp.hook_pre": "the neurons of the MLP are",
    "mlp.hook_post": "the neurons of the MLP are",
    "ln1.hook_normalized": "the normalized input of attention is",
}

_MLP: Final = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_ATTENTION: Final = ("self_attn", "attn", "attention", "self_attention")
#: What the names of modules below a decoder layer of Hugging Face's mean.
_SUBMODULES: Final = {
    "": "hook_resid_post",
    "output": "hook_resid_post",
    "input": "hook_resid_pre",
    **{f"{name}{end}": "mlp.hook_out" for name in _MLP for end in ("", ".output")},
    **{f"{name}{end}": "attn.hook_out" for name in _ATTENTION for end in ("", ".output")},
    **{f"{name}.input": "mlp.hook_in" for name in _MLP},
    **{f"{name}.input": "attn.hook_in" for name in _ATTENTION},
    **{
        f"{name}.{projection}.input": "attn.hook_z"
        for name in _ATTENTION
        for projection in ("o_proj", "c_proj", "out_proj", "dense")
    },
    # GPT-2's norm before the MLP. Most models call theirs post_attention_layernorm; in Gemma 2 and
    # 3 that is another norm, so the name is not understood.
    "ln_2": "mlp.hook_in",
    "ln_2.output": "mlp.hook_in",
    # Gemma 2 and 3.
    "pre_feedforward_layernorm.input": "hook_resid_mid",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "pre_feedforward_layernorm": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "post_feedforward_layernorm": "hook_mlp_out",
}

# What may stand around a language model's layers. Not a vision or audio tower, an encoder, or the
# layers of a draft model: theirs are other layers.
_PREFIX: Final = (
    r"(?:(?:model|language_model|text_model|base_model|transformer|gpt_neox|backbone|decoder|llm|"
    r"module|_orig_mod)\.)"
)
_MODULE: Final = re.compile(
    rf"(?:{_PREFIX}*(?:layers|layer|h)|{_PREFIX}+blocks)\.(\d{{1,5}})(?:\.([\w.]+))?", re.ASCII
)
_BLOCK: Final = re.compile(r"blocks\.(\d{1,5})\.([\w.]+)", re.ASCII)
# An SAE that is attached to a TransformerLens model has hook points of its own; this one is fed
# what stands at the place itself.
_ATTACHED: Final = ".hook_sae_input"


class UnknownHookError(SAEError):
    """A name that is not understood: someone who knows the place may state it."""


def parse_hook(name: str) -> HookPoint:
    """The hook point that a name of any of the vocabularies means.

    Raises:
        UnknownHookError: if the name is not understood.
        SAEError: if it is that of a place at which nothing is served.
    """
    plain = name.strip().removesuffix(_ATTACHED)
    if match := _BLOCK.fullmatch(plain):
        kind = _BRIDGE.get(match[2], match[2])
    elif match := _MODULE.fullmatch(plain):
        kind = _SUBMODULES.get(match[2] or "", "")
    else:
        raise UnknownHookError(f"unknown hook point {name!r:.120}: {_hint(plain)}")
    if kind in _UNSERVED:
        raise SAEError(
            f"{_UNSERVED[kind]} not supported: {name!r:.120}; an SAE of it cannot be served at "
            "another hook point"
        )
    if kind not in HOOK_KINDS:
        raise UnknownHookError(f"unknown hook point {name!r:.120}: {_hint(plain)}")
    return HookPoint(layer=int(match[1]), kind=kind)


def _hint(name: str) -> str:
    if name == "hook_embed" or name.endswith(("embed_tokens", "wte", "embed_in")):
        return (
            "an embedding's output is blocks.0.hook_resid_pre if the model adds no position "
            f"embedding to it; expected {EXPECTED}"
        )
    if re.search(r"\.-\d", name):
        return f"layers are counted from the model's first one, which is 0; expected {EXPECTED}"
    return f"expected {EXPECTED}"
