"""Every entry of SAELens' registry as tiny files in its layout, opened here and by SAELens.

``python -m tests.sae.census`` writes each entry's files as its loader reads them, with random
weights, opens them as ``sae_lens://RELEASE/SAE_ID`` is opened once it has been fetched, and holds
places, activations and output against those of SAELens' own class. A table by suite follows, and
every refusal's reason. No weights are downloaded.

Three differences are meant. Two do not show: Llama Scope's threshold counts the decoder rows' norms
(they are 1 here), and centered models' SAEs read the stream without its mean (the inputs have
none). And SAELens brings the decoder of Gemma Scope's embedding SAEs to the stream's scale, but not
its bias, which is left out of that comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from sae import registry
from sae.errors import SAEError
from sae.hook_names import parse_hook
from sae.sae import SAE, open_sae
from sae.source import ResolvedSAE
from tests.sae.oracles import quiet
from tests.sae.registry_layouts import D_IN, D_SAE, Layouts

#: By how a repository's name begins, or by the release's.
SUITES: Final = (
    ("Gemma Scope 2", r"google/gemma-scope-2-"),
    ("Gemma Scope", r"google/gemma-scope-"),
    ("SAE Bench (dictionary_learning)", r"(?:canrager|adamkarvonen)/(?:saebench|lm_sae)"),
    ("Qwen-Scope", r"Qwen/SAE-Res-"),
    ("Llama Scope R1-Distill", r"fnlp/Llama-Scope-R1"),
    ("Llama Scope", r"fnlp/"),
    ("circuit-tracer (Qwen3, Gemma-2 CLT)", r"(?:mwhanna|mntss)/"),
    ("GPT-2 small", r".*(?i:gpt2)"),
    ("Matryoshka (chanind)", r"chanind/"),
    ("andyrdt", r"andyrdt/"),
    ("Pythia", r".*pythia"),
)
OTHER: Final = "others"
_EMBEDDING: Final = "hook_embed"
#: Largest difference, of activations and of the output's largest value.
TOLERANCE: Final = 1e-5


@dataclass(frozen=True)
class Entry:
    """One SAE of the registry."""

    release: str
    sae_id: str
    repo: str
    loader: str

    @property
    def suite(self) -> str:
        return next((name for name, words in SUITES if re.match(words, self.repo)), OTHER)

    @property
    def source(self) -> str:
        return f"sae_lens://{self.release}/{self.sae_id}"


@dataclass(frozen=True)
class Finding:
    """What became of an entry.

    Attributes:
        kind: of its card; empty where it was refused.
        refusal: why; empty where it was opened.
        difference: from what SAELens makes of it; empty where there is none, or it was not asked.
    """

    entry: Entry
    kind: str = ""
    refusal: str = ""
    difference: str = ""


def entries() -> list[Entry]:
    """All of the registry."""
    return [
        Entry(
            release, str(sae["id"]), values["repo_id"], values.get("conversion_func") or "sae_lens"
        )
        for release, values in registry._registry().items()
        for sae in values["saes"]
    ]


def sample(found: Iterable[Entry], every: int) -> list[Entry]:
    """The first of each release, and one of so many of the others."""
    seen: Counter[str] = Counter()
    kept = []
    for entry in found:
        if seen[entry.release] % every == 0:
            kept.append(entry)
        seen[entry.release] += 1
    return kept


def opened(entry: Entry, layouts: Layouts) -> SAE:
    """The entry's files, written and opened. Raises SAEError where it is refused."""
    found = registry.look_up(entry.source)
    path = layouts.write(entry.loader, found)
    return open_sae(ResolvedSAE(name="x", source=entry.source, path=str(path), facts=found.facts))


def census(found: Iterable[Entry], root: Path, *, compare: bool) -> Iterator[Finding]:
    """What becomes of each entry, its files below ``root``; beside SAELens if ``compare``."""
    layouts = Layouts(root)
    with sae_lens_reading(layouts) if compare else contextlib.nullcontext():
        for entry in found:
            try:
                mine = opened(entry, layouts)
            except SAEError as error:
                yield Finding(entry, refusal=str(error))
                continue
            difference = difference_from_sae_lens(entry, mine) if compare else ""
            yield Finding(entry, kind=mine.card.kind, difference=difference)


@contextlib.contextmanager
def sae_lens_reading(layouts: Layouts) -> Iterator[None]:
    """SAELens' loaders, whose hub is the folder of the layouts."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from safetensors import safe_open

    names = ("hf_hub_download", "get_safetensors_tensor_shapes")
    kept = {name: getattr(loaders, name) for name in names}

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: object) -> str:
        path = layouts.root / repo_id / (subfolder or "") / filename
        if not path.is_file():
            raise loaders.EntryNotFoundError(str(path))
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(download(repo_id, filename), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    loaders.hf_hub_download = download
    loaders.get_safetensors_tensor_shapes = shapes
    try:
        with quiet():
            yield
    finally:
        for name, value in kept.items():
            setattr(loaders, name, value)


def difference_from_sae_lens(entry: Entry, mine: SAE) -> str:
    """In what an SAE is another one than SAELens makes of the same files; empty if in nothing."""
    theirs, said = _theirs(entry)
    card = mine.card
    reads, writes = _places(said)
    if (card.reads, card.writes[0]) != (reads, writes):
        return f"reads {card.reads} and writes {card.writes[0]}, SAELens {reads} and {writes}"
    x = torch.randn(7, D_IN, generator=torch.Generator().manual_seed(3)) * 3
    x -= x.mean(dim=1, keepdim=True)
    # It reads heads apart, of which there may be any number.
    their_x = x.view(len(x), 2, -1) if theirs.cfg.reshape_activations == "hook_z" else x
    f, their_f = mine.encode(x), theirs.encode(their_x)
    if not bool((f != 0).any()) or not _close(f, their_f):
        return f"activations differ by {float((f - their_f).abs().max()):.2g}"
    # Of a cross-layer transcoder SAELens makes one that writes the sum at one place.
    if card.kind != "clt":
        out = mine.decode(f, x)
        their_out = _output(theirs, their_f, their_x).reshape(out.shape)
        if said["hook_name"] == _EMBEDDING:
            out, their_out = out - mine.b_dec, their_out - theirs.b_dec
        if not _close(out, their_out):
            return f"the output differs by {float((out - their_out).abs().max()):.2g}"
    return ""


def _theirs(entry: Entry) -> tuple[Any, dict[str, Any]]:
    from sae_lens import SAE as TheirSAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    said: dict[str, Any] = {}

    def converter(**arguments: Any) -> Any:
        # The widths that it knows are those of the published files.
        widths = {"d_in": D_IN, "d_sae": D_SAE}
        arguments["cfg_overrides"] = {**(arguments.get("cfg_overrides") or {}), **widths}
        cfg, state, sparsity = loaders.NAMED_PRETRAINED_SAE_LOADERS[entry.loader](**arguments)
        if "d_out" in cfg:
            cfg["d_out"] = state["W_dec"].shape[1]
        said.update(cfg)
        said.update(cfg.get("metadata") or {})
        return cfg, state, sparsity

    theirs, _, _ = TheirSAE.from_pretrained_with_cfg_and_sparsity(
        entry.release, entry.sae_id, converter=converter
    )
    return theirs, said


def _places(said: dict[str, Any]) -> tuple[str, str]:
    """Where SAELens' configuration says that it reads and writes."""
    if said["hook_name"] == _EMBEDDING:
        return ("blocks.0.hook_resid_pre",) * 2
    if said.get("hook_name_out") is None:
        return (str(parse_hook(said["hook_name"])),) * 2
    # What it calls hook_mlp_in is no hook point of that name: the module's name counts.
    reads = said.get("hf_hook_name") or said["hook_name"]
    return str(parse_hook(reads)), str(parse_hook(said["hook_name_out"]))


def _output(theirs: Any, f: Tensor, x: Tensor) -> Tensor:
    found: Tensor = theirs(x) if hasattr(theirs, "W_skip") else theirs.decode(f)
    return found


def _close(a: Tensor, b: Tensor) -> bool:
    scale = max(float(b.abs().max()), 1.0)
    return a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * scale


def table(findings: Iterable[Finding]) -> str:
    """Markdown, a suite a line, and the reasons of what is refused."""
    total: Counter[str] = Counter()
    served: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        suite = finding.entry.suite
        total[suite] += 1
        served[suite] += not finding.refusal
        if finding.refusal:
            reasons[suite, finding.refusal.partition(": ")[2]] += 1
        if finding.difference:
            reasons[suite, f"opened, and {finding.difference}"] += 1
    lines = ["| suite | entries | served | refused |", "| --- | --- | --- | --- |"]
    for suite, count in total.most_common():
        why = "; ".join(f"{n} {reason}" for (s, reason), n in reasons.items() if s == suite)
        lines.append(f"| {suite} | {count:,} | {served[suite]:,} | {why} |")
    everything, all_served = sum(total.values()), sum(served.values())
    share = 100 * all_served / everything
    lines.append(f"| **all** | **{everything:,}** | **{all_served:,} ({share:.2f}%)** | |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if anything is another SAE than SAELens says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="one of so many of a release")
    parser.add_argument("--alone", action="store_true", help="without SAELens beside it")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        chosen = sample(entries(), arguments.every)
        findings = list(census(chosen, Path(root), compare=not arguments.alone))
    print(table(findings))
    return any(finding.difference for finding in findings)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
