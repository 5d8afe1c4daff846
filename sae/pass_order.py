"""In which order a forward pass comes by the hook points."""

from __future__ import annotations

from typing import Final

from sae.card import HOOK_KINDS, HookPoint

#: Within one layer. A module's own output stands before what a later norm makes of it.
_WITHIN_LAYER: Final = (
    "hook_resid_pre",
    "attn.hook_z",
    "attn.hook_out",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_normalized",
    "mlp.hook_in",
    "mlp.hook_out",
    "hook_mlp_out",
    "hook_resid_post",
)
assert {*_WITHIN_LAYER} == {*HOOK_KINDS}


def place_in_pass(hook: str) -> tuple[int, int]:
    """What orders hook points as a pass comes by them: layer, then place within the layer."""
    point = HookPoint.parse(hook)
    return point.layer, _WITHIN_LAYER.index(point.kind)
