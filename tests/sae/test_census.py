"""Every entry of SAELens' registry opens as what SAELens makes of it, but those that cannot."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

from sae import registry
from sae.errors import SAEError
from tests.sae.census import Entry, Finding, census, entries, sample, table
from tests.sae.oracles import oracle

#: What entries of SAELens 6.54 are, and how many are refused; a later registry has more.
KINDS = {"sae": 10_018, "transcoder": 3_810, "clt": 26, "": 3}
REFUSED = "this is a temporal SAE, which attends over the sequence"
#: Whose registry the table in the README is of.
COUNTED = "6.54.12"
README = Path(__file__).parents[2] / "sae" / "README.md"


def test_a_sample_of_every_release_is_what_sae_lens_makes_of_it(tmp_path: Path) -> None:
    oracle("sae_lens", "sae-lens")
    found = list(census(sample(entries(), every=10**6), tmp_path, compare=True))
    assert [f"{f.entry.source}: {f.difference}" for f in found if f.difference] == []
    assert {f.entry.loader for f in found if f.refusal} == {"temporal"}
    assert len({f.entry.release for f in found}) >= 170
    assert "| **all** |" in table(found)


def test_the_table_in_the_readme_is_of_every_entry_of_the_registry() -> None:
    oracle("sae_lens", "sae-lens")
    if version("sae-lens") != COUNTED:
        pytest.skip(f"the table is of SAELens {COUNTED}")

    def by_loader(entry: Entry) -> Finding:
        if entry.loader != "temporal":
            return Finding(entry)  # the two tests around this one open it
        with pytest.raises(SAEError) as refused:
            registry.look_up(entry.source)
        return Finding(entry, refusal=str(refused.value))

    assert table(map(by_loader, entries())) in README.read_text()


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
    if version("sae-lens") == COUNTED:
        assert table(found) in README.read_text()
