"""What rows that are added within a branch make of the stream, by a checkpoint's weights.

Attention's heads are followed by the output projection, and in some models a branch ends with a
norm. A decoder row that is added before them enters the stream as::

    attn.hook_z                  gain * (W_O row)
    attn.hook_out, mlp.hook_out  gain * row

up to the norm's factor, which all elements have in common, and up to what the norm takes away along
the branch's own direction, which differs from token to token. Without such a norm gain is 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors import safe_open
from torch import Tensor

from sae.card import HEADS, HookPoint

#: What a tensor's dtype must be to be computed with as it is stored.
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})

_LAYER: Final = r"(?:^|\.)(?:layers|h|blocks)\.{layer}\.{name}\.weight"
_PROJECTION: Final = (
    r"(?:self_attn|attn|attention|self_attention)\.(?:o_proj|c_proj|out_proj|dense)"
)
_NOT_THE_DECODER: Final = re.compile(r"(?:^|\.)(?:vision|visual|audio|encoder|mtp)[^.]*\.", re.I)
#: Model types whose projections are stored as [heads, d_model].
_TRANSPOSED: Final = frozenset({"gpt2"})
#: The norms that end a branch. What Llama calls post_attention_layernorm is before the MLP, unless
#: the MLP has norms of its own.
_AFTER_ATTENTION: Final = "post_attention_layernorm"
_OF_THE_MLP: Final = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_NORMS: Final[Mapping[str, tuple[str, ...]]] = {
    HEADS: ("post_self_attn_layernorm", _AFTER_ATTENTION),
    "attn.hook_out": ("post_self_attn_layernorm", _AFTER_ATTENTION),
    "mlp.hook_out": ("post_mlp_layernorm", "post_feedforward_layernorm"),
}


class BranchOutputs:
    """The output projections of attention and the norms that end branches, of one checkpoint.

    Args:
        files: the name of every tensor, and the file that it is in.
        model_type: that of the checkpoint's configuration.
        plus_one: whether its norms multiply by 1 + weight.
    """

    def __init__(self, files: Mapping[str, Path], model_type: str, *, plus_one: bool) -> None:
        self._files = {n: path for n, path in files.items() if not _NOT_THE_DECODER.search(n)}
        self._transposed = model_type in _TRANSPOSED
        self._plus_one = plus_one

    def in_stream(self, rows: Tensor, hook: HookPoint) -> Tensor | None:
        """What the stream gains if rows are added at a hook point.

        Args:
            rows: ``[n, d]`` float32, d being the width at that hook point.
            hook: the hook point.

        Returns:
            ``[n, d_model]`` float32; None if the checkpoint does not show the projection.
        """
        names = _NORMS.get(hook.kind)
        if names is None:
            return rows
        if hook.kind == HEADS:
            W_O = self._tensor(hook.layer, _PROJECTION)
            W_O = W_O.T if W_O is not None and self._transposed else W_O
            if W_O is None or W_O.dim() != 2 or W_O.shape[1] != rows.shape[1]:
                return None
            rows = rows @ W_O.T
        for name in names:
            if name == _AFTER_ATTENTION and not self._has_any(hook.layer, _OF_THE_MLP):
                continue
            gain = self._tensor(hook.layer, name)
            if gain is not None:
                return rows * (gain + float(self._plus_one))
        return rows

    def _has_any(self, layer: int, names: tuple[str, ...]) -> bool:
        return any(self._name(layer, name) is not None for name in names)

    def _name(self, layer: int, name: str) -> str | None:
        pattern = re.compile(_LAYER.format(layer=layer, name=name) + "$")
        found = [stored for stored in self._files if pattern.search(stored)]
        return found[0] if len(found) == 1 else None

    def _tensor(self, layer: int, name: str) -> Tensor | None:
        """A tensor in float32; None if it is not there exactly once, or is quantized."""
        stored = self._name(layer, name)
        if stored is None:
            return None
        with safe_open(self._files[stored], framework="pt") as file:
            if file.get_slice(stored).get_dtype() not in FLOATS:
                return None
            tensor: Tensor = file.get_tensor(stored).float()
        return tensor
