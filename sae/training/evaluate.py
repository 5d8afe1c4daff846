"""Measure a dictionary on text kept out of its training, and show what each feature fires on.

    python -m sae.training.evaluate --model FOLDER --work FOLDER --sae FOLDER [--statistics]

prints the figures as JSON and writes ``contexts.HOOK.txt`` to the work folder, HOOK being where the
dictionary writes: the strongest contexts of every feature, from which a person labels them. Losses
are taken in ``--loss-windows`` windows, since each takes four passes of the whole model. With
``--statistics`` the maximum activations and densities over the training text go to
``features.jsonl`` beside the weights, and the fraction of variance unexplained and L0 into their
configuration, for a server to check itself against.

What is reconstructed is what passes where the dictionary writes: for a transcoder, the MLP's
output. Every figure is over the tokens that `sae.training.activations` records: not a sequence's
first, no special tokens, no sinks of the stream. Figures are float32, of bfloat16 activations.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.functional import cross_entropy

from sae.card import HookPoint
from sae.sae import SAE, open_sae
from sae.source import SAEReference
from sae.training.activations import (
    Window,
    batches,
    places,
    recorded,
    sink_norm,
    stored,
    stored_pairs,
    windows,
)
from sae.training.corpus import read
from sae.training.model_hooks import watch

CHUNK: Final = 2048  # rows encoded at a time
CONTEXTS: Final = 12
BEFORE: Final = 14  # tokens of a context before the one that fires
AFTER: Final = 6


@dataclass(frozen=True)
class Reconstruction:
    """How well, and with how many features, a dictionary says what passes where it writes.

    Attributes:
        tokens: how many it is measured on.
        fvu: fraction of variance unexplained, sum |y - y_hat|^2 / sum |y - mean y|^2; an SAE's y is
            its x.
        l0: mean number of active features.
        silent: share of features that no token activates.
    """

    tokens: int
    fvu: float
    l0: float
    silent: float


@dataclass(frozen=True)
class Losses:
    """Mean next-token cross-entropy in nats after something stands in for recorded tokens.

    Attributes:
        clean: nothing stands in.
        reconstructed: what the dictionary makes of it stands in.
        zero: zero stands in.
        mean: the mean over recorded tokens stands in.
    """

    clean: float
    reconstructed: float
    zero: float
    mean: float

    def recovered(self, ablated: float) -> float:
        """Share of the loss that an ablation costs and the SAE does not."""
        return (ablated - self.reconstructed) / (ablated - self.clean)


@dataclass(frozen=True)
class Statistics:
    """Figures of every feature over some rows, `[d_sae]`, and its n strongest, `[n, d_sae]`."""

    max_activation: torch.Tensor
    density: torch.Tensor
    strongest: torch.Tensor
    strongest_rows: torch.Tensor


def encoded(sae: SAE, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows in chunks, float32, with their activations: `[n, d_in]`, `[n, d_sae]`."""
    for start in range(0, len(rows), CHUNK):
        x = rows[start : start + CHUNK].float()
        yield x, sae.encode(x)


def reconstruction(
    sae: SAE, rows: torch.Tensor, targets: torch.Tensor | None = None
) -> Reconstruction:
    """`Reconstruction` of `targets` `[num_rows, d_out]` from `rows` `[num_rows, d_in]`.

    Without targets, the rows themselves are reconstructed.
    """
    targets = rows if targets is None else targets
    mean = targets.float().mean(dim=0)
    unexplained = variance = active = 0.0
    fired = torch.zeros(sae.card.d_sae, dtype=torch.bool)
    for (x, f), part in zip(encoded(sae, rows), torch.split(targets, CHUNK), strict=True):
        y = part.float()
        unexplained += float((y - sae.decode(f, x)).square().sum())
        variance += float((y - mean).square().sum())
        active += float((f > 0).sum())
        fired |= (f > 0).any(dim=0)
    return Reconstruction(
        tokens=len(rows),
        fvu=unexplained / variance,
        l0=active / len(rows),
        silent=1.0 - float(fired.float().mean()),
    )


def statistics(sae: SAE, rows: torch.Tensor, count: int = CONTEXTS) -> Statistics:
    """`Statistics` over `rows` `[num_rows, d_in]`, with each feature's `count` strongest rows."""
    fired = torch.zeros(sae.card.d_sae)
    values = torch.zeros(count, sae.card.d_sae)
    index = torch.zeros(count, sae.card.d_sae, dtype=torch.long)
    start = 0
    for _, f in encoded(sae, rows):
        fired += (f > 0).sum(dim=0)
        new_values, new_index = f.topk(min(count, len(f)), dim=0)
        merged = torch.cat([values, new_values])
        values, order = merged.topk(count, dim=0)
        index = torch.cat([index, new_index + start]).gather(0, order)
        start += len(f)
    return Statistics(values[0], fired / len(rows), values, index)


#: x and y of recorded tokens, `[n, d_in]` and `[n, d_out]` float32, to what stands in for y.
Replacement = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def losses(model: Any, tokenizer: Any, cuts: list[Window], sae: SAE, mean: torch.Tensor) -> Losses:
    """`Losses` of a causal language model of transformers on these windows.

    A token's loss counts if the token before it is a recorded one.

    Args:
        model: with the decoder's layers at ``model.model.layers``.
        tokenizer: its tokenizer.
        cuts: the windows.
        sae: the dictionary, which writes at one place.
        mean: `[d_out]`, of what passes there.
    """
    replacements: dict[str, Replacement] = {
        "clean": lambda x, y: y,
        "reconstructed": lambda x, y: sae.decode(sae.encode(x), x),
        "zero": lambda x, y: torch.zeros_like(y),
        "mean": lambda x, y: mean.expand_as(y),
    }
    sums = dict.fromkeys(replacements, 0.0)
    counted = 0
    for batch, ids in batches(cuts, tokenizer.pad_token_id or 0):
        for name, replacement in replacements.items():
            logits, kept = _logits(model, sae, batch, ids, tokenizer, replacement)
            inside = kept[:, :-1] & (torch.arange(1, ids.shape[1]) < _lengths(batch)[:, None])
            sums[name] += float(
                cross_entropy(logits[:, :-1][inside].float(), ids[:, 1:][inside], reduction="sum")
            )
        counted += int(inside.sum())
    return Losses(**{name: total / counted for name, total in sums.items()})


def _logits(
    model: Any,
    sae: SAE,
    batch: list[Window],
    ids: torch.Tensor,
    tokenizer: Any,
    replacement: Replacement,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[windows, length, vocabulary]`, and for which tokens something stood in."""
    reads, writes = HookPoint.parse(sae.card.reads), HookPoint.parse(sae.card.hook)
    seen: list[torch.Tensor] = []  # x of recorded tokens
    kept = torch.zeros_like(ids, dtype=torch.bool)

    def read_x(x: torch.Tensor) -> torch.Tensor:
        kept.copy_(recorded(batch, ids, x, tokenizer.all_special_ids, sink_norm(reads)))
        seen.append(x[kept].float())
        return x

    def write_y(y: torch.Tensor) -> torch.Tensor:
        edited = y.clone()
        edited[kept] = replacement(seen.pop(), y[kept].float()).to(y.dtype)
        return edited

    layers = model.model.layers
    handles = [watch(layers, reads, read_x), watch(layers, writes, write_y)]
    try:
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, kept


def spaced(cuts: list[Window], count: int) -> list[Window]:
    """At most `count` of the windows at even distances, so that short ones stay among them."""
    return cuts[:: max(1, math.ceil(len(cuts) / count))]


def _lengths(batch: list[Window]) -> torch.Tensor:
    return torch.tensor([len(window.ids) for window in batch])


def context(tokenizer: Any, window: Window, position: int) -> str:
    """The text around one token, with the token between guillemets, on one line."""
    before, at, after = (
        tokenizer.decode(ids)
        for ids in (
            window.ids[max(0, position - BEFORE) : position],
            window.ids[position : position + 1],
            window.ids[position + 1 : position + 1 + AFTER],
        )
    )
    return f"{before}«{at}»{after}".replace("\n", "⏎")


def write_contexts(
    path: Path, tokenizer: Any, cuts: list[Window], place: torch.Tensor, found: Statistics
) -> None:
    """Write the strongest contexts of every feature that fires, for a person to read."""
    with path.open("w", encoding="utf-8") as file:
        for feature in range(len(found.max_activation)):
            if found.max_activation[feature] == 0:
                continue
            file.write(
                f"# {feature}: max {found.max_activation[feature]:.1f}, "
                f"density {found.density[feature]:.4%}\n"
            )
            strengths = found.strongest[:, feature].tolist()
            rows = place[found.strongest_rows[:, feature]].tolist()
            for strength, (window, position) in zip(strengths, rows, strict=True):
                if strength > 0:
                    file.write(f"  {strength:5.1f} {context(tokenizer, cuts[window], position)}\n")


def write_statistics(path: Path, found: Statistics) -> None:
    """Write `features.jsonl` (see `sae.features`), without labels: these have yet to be written."""
    with path.open("w", encoding="utf-8") as file:
        for feature, (largest, density) in enumerate(
            zip(found.max_activation.tolist(), found.density.tolist(), strict=True)
        ):
            row = {
                "index": feature,
                "label": None,
                "max_activation": round(largest, 1) or None,
                "density": round(density, 6),
            }
            file.write(json.dumps(row) + "\n")


def state(path: Path, fit: Reconstruction) -> None:
    """Put what was measured into the metadata of a `cfg.json`."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["metadata"] |= {"fvu": round(fit.fvu, 3), "l0": round(fit.l0, 1)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--statistics", action="store_true")
    parser.add_argument("--loss-windows", type=int, default=100)
    arguments = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    sae = open_sae(SAEReference(name="sae", source=str(arguments.sae)))
    reads, writes = sae.card.reads, sae.card.hook
    # First what a person reads while the losses are taken.
    found = statistics(sae, stored(arguments.work, "corpus", reads))
    write_contexts(
        arguments.work / f"contexts.{writes}.txt",
        tokenizer,
        windows(tokenizer, read(arguments.work / "corpus.jsonl")),
        places(arguments.work, "corpus", reads),
        found,
    )
    held_out, targets = stored_pairs(arguments.work, "held_out", reads, writes)
    fit = reconstruction(sae, held_out, targets)
    if arguments.statistics:
        write_statistics(arguments.sae / "features.jsonl", found)
        state(arguments.sae / "cfg.json", fit)
    figures = losses(
        model,
        tokenizer,
        spaced(windows(tokenizer, read(arguments.work / "held_out.jsonl")), arguments.loss_windows),
        sae,
        targets.float().mean(dim=0),
    )
    report = {
        **asdict(fit),
        "dead": float((found.max_activation == 0).float().mean()),
        **{f"loss_{name}": value for name, value in asdict(figures).items()},
        "loss_recovered_of_zero": figures.recovered(figures.zero),
        "loss_recovered_of_mean": figures.recovered(figures.mean),
    }
    assert all(map(math.isfinite, report.values()))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
