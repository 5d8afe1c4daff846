"""Every entry of SAELens' registry opens as what SAELens makes of it, but those that cannot."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.sae.census import census, entries, sample, table
from tests.sae.oracles import oracle

#: What entries of SAELens 6.54 are, and how many are refused; a later registry has more.
KINDS = {"sae": 10_018, "transcoder": 3_810, "clt": 26, "": 3}
REFUSED = "this is a temporal SAE, which attends over the sequence"


def test_a_sample_of_every_release_is_what_sae_lens_makes_of_it(tmp_path: Path) -> None:
    oracle("sae_lens", "sae-lens")
    found = list(census(sample(entries(), every=10**6), tmp_path, compare=True))
    assert [f"{f.entry.source}: {f.difference}" for f in found if f.difference] == []
    assert {f.entry.loader for f in found if f.refusal} == {"temporal"}
    assert len({f.entry.release for f in found}) >= 170
    assert "| **all** |" in table(found)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_every_entry_is_what_sae_lens_makes_of_it(tmp_path: Path) -> None:
    oracle("sae_lens", "sae-lens")
    found = list(census(entries(), tmp_path, compare=True))
    assert [f"{f.entry.source}: {f.difference}" for f in found if f.difference] == []
    refusals = {f.refusal.partition(";")[0].partition(": ")[2] for f in found if f.refusal}
    assert refusals == {REFUSED}
    kinds = Counter(f.kind for f in found)
    assert all(kinds[kind] >= count for kind, count in KINDS.items()), kinds
    assert kinds[""] <= 0.001 * len(found)
