"""A card for tests that need one."""

from __future__ import annotations

from sae.card import SAECard

CARD = SAECard(
    id="l15",
    hook="blocks.15.hook_resid_post",
    layer=15,
    architecture="jumprelu",
    d_in=576,
    d_sae=4608,
    dtype="float32",
    source="hf://owner/repo",
    format="sae_lens",
    sha256=None,
    sink_norm=None,
    error_term=True,
    has_labels=True,
    has_max_activations=True,
)
