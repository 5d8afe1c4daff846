"""The order in which a forward pass reaches the hook points."""

from __future__ import annotations

from typing import Final

from sae.card import HOOK_KINDS, HookPoint

#: The order within one layer. A module's own output stands before what a later norm makes of it.
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
    """The key by which hook points sort in a pass's order: layer, then place in the layer."""
    point = HookPoint.parse(hook)
    return point.layer, _WITHIN_LAYER.index(point.kind)
