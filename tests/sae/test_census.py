"""Every entry of SAELens' registry opens as what SAELens makes of it, but those that cannot."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.sae.census import census, entries, sample, table
from tests.sae.oracles import oracle

#: What entries of SAELens 6.54 are; a later registry has more of each.
KINDS = {"sae": 10_021, "transcoder": 3_807, "clt": 26, "": 3}


def test_a_sample_of_every_release_is_what_sae_lens_makes_of_it(tmp_path: Path) -> None:
    oracle("sae_lens", "sae-lens")
    found = list(census(sample(entries(), every=10**6), tmp_path, compare=True))
    assert [f"{f.entry.source}: {f.difference}" for f in found if f.difference] == []
    assert {f.entry.source for f in found if f.refusal} == {
        "sae_lens://temporal-sae-gemma-2-2b/blocks.12.hook_resid_post",
        "sae_lens://temporal-sae-llama-3.1-8b/blocks.15.hook_resid_post",
    }
    assert len(found) >= 170
    assert "| **all** |" in table(found)


@pytest.mark.timeout(300)
def test_all_but_temporal_saes_open(tmp_path: Path) -> None:
    oracle("sae_lens", "sae-lens")
    found = list(census(entries(), tmp_path, compare=False))
    assert {f.refusal.partition(";")[0].partition(": ")[2] for f in found if f.refusal} == {
        "this is a temporal SAE, which attends over the sequence"
    }
    kinds = Counter(f.kind for f in found)
    assert all(kinds[kind] >= count for kind, count in KINDS.items()), kinds
    assert kinds[""] <= 0.001 * len(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_entry_is_what_sae_lens_makes_of_it(tmp_path: Path) -> None:
    oracle("sae_lens", "sae-lens")
    found = census(entries(), tmp_path, compare=True)
    assert [f"{f.entry.source}: {f.difference}" for f in found if f.difference] == []
