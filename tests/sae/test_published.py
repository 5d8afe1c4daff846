"""Published SAEs, fetched from the hub: ``HF_HUB_OFFLINE=0 pytest -m network tests/sae``."""

from __future__ import annotations

import pytest

from sae.sae import open_sae
from sae.source import SAEReference

#: Source, and what its card must say: format, architecture, hook, d_in, d_sae.
PUBLISHED = {
    "sae_lens://gpt2-small-res-jb/blocks.8.hook_resid_pre": (
        *("sae_lens", "standard", "blocks.8.hook_resid_pre", 768, 24576),
    ),
    "hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71": (
        *("gemma_scope", "jumprelu", "blocks.20.hook_resid_post", 2304, 16384),
    ),
}


@pytest.mark.network
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("source", PUBLISHED)
def test_a_published_sae_opens_and_its_weights_are_finite(source: str) -> None:
    sae = open_sae(SAEReference(name="published", source=source))
    card = sae.card
    found = (card.format, card.architecture, card.hook, card.d_in, card.d_sae)
    assert found == PUBLISHED[source]
    sae.scan_nonfinite()
