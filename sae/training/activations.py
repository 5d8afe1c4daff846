"""Record what passes hook points of the model on the corpus, for dictionaries to be trained on.

    python -m sae.training.activations --model FOLDER --work FOLDER [--hooks HOOK ...]

reads ``corpus.jsonl`` and ``held_out.jsonl``, and writes for each of them and each hook point
``NAME.HOOK.activations``, which is ``[num_rows, d]`` bfloat16, and ``NAME.HOOK.places``,
``[num_rows, 2]`` int32: the window and the position in it of each row. Reading the corpus once and
training from disk makes several passes cheap: on one core the model reads about 1,000 tokens a
second, however many hook points are recorded.

Left out are the tokens that a served request does not steer either: a sequence's first, special
tokens, and, of the residual stream, attention sinks, whose norm is a hundred times the median and
would be all the loss. Elsewhere sinks do not stand out: at layer 14 the MLP's input has a norm of
0.6 at sinks, and a median norm of 3.5.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from sae.card import HookPoint
from sae.hook_names import parse_hook
from sae.training.corpus import read
from sae.training.model_hooks import caught
from sae.training.texts import Document

logger = logging.getLogger(__name__)

#: The demo SAE's.
HOOK: Final = "blocks.14.hook_resid_post"
SINK_NORM: Final = 2000.0
#: Tokens of a window; a served chat is about as long.
WINDOW: Final = 256
BATCH_TOKENS: Final = 4096


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document; those before `first` are context."""

    ids: list[int]
    first: int
    document: Document


def windows(tokenizer: Any, texts: Iterable[Document]) -> list[Window]:
    """Documents cut into windows of `WINDOW` tokens, the longest first."""
    cuts = []
    for document in texts:
        context = tokenizer(document.context, add_special_tokens=False)["input_ids"]
        ids = context + tokenizer(document.text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), WINDOW):
            cuts.append(Window(ids[start : start + WINDOW], max(0, len(context) - start), document))
    return sorted(cuts, key=lambda window: -len(window.ids))


def batches(cuts: list[Window], pad: int) -> Iterator[tuple[list[Window], torch.Tensor]]:
    """Batches of windows of about one length, and their ids `[windows, length]` padded by `pad`."""
    start = 0
    while start < len(cuts):
        length = len(cuts[start].ids)
        batch = cuts[start : start + max(1, BATCH_TOKENS // length)]
        start += len(batch)
        rows = [window.ids + [pad] * (length - len(window.ids)) for window in batch]
        yield batch, torch.tensor(rows)


def sink_norm(point: HookPoint) -> float | None:
    """The norm above which a token is a sink at a hook point; None if norms do not tell there."""
    return SINK_NORM if point.kind.startswith("hook_resid_") else None


def recorded(
    batch: list[Window],
    ids: torch.Tensor,
    x: torch.Tensor,
    special: list[int],
    most: float | None = SINK_NORM,
) -> torch.Tensor:
    """Which tokens count: `[windows, length]` bool.

    Args:
        batch: the windows.
        ids: `[windows, length]`.
        x: `[windows, length, d]`, what passes the hook point.
        special: ids of special tokens.
        most: the norm above which a token is a sink.
    """
    position = torch.arange(ids.shape[1])
    first = torch.tensor([max(1, window.first) for window in batch])
    end = torch.tensor([len(window.ids) for window in batch])
    inside = (position >= first[:, None]) & (position < end[:, None])
    kept: torch.Tensor = inside & ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype))
    return kept if most is None else kept & (x.float().norm(dim=-1) <= most)


def extract(
    model: Any, tokenizer: Any, cuts: list[Window], points: Sequence[HookPoint]
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """For each batch, each hook point's rows `[num_recorded, d]` and places `[num_recorded, 2]`.

    Args:
        model: the decoder, with its layers at ``model.layers``.
        tokenizer: its tokenizer.
        cuts: the windows.
        points: what is recorded.
    """
    start = 0
    for batch, ids in batches(cuts, tokenizer.pad_token_id or 0):
        # Padding stands on the right and attention looks left: no mask is needed.
        found = caught(model.layers, points, lambda ids=ids: model(input_ids=ids, use_cache=False))
        of_batch = []
        for point, x in zip(points, found, strict=True):
            kept = recorded(batch, ids, x, tokenizer.all_special_ids, sink_norm(point))
            of_batch.append((x[kept], kept.nonzero() + torch.tensor([start, 0])))
        yield of_batch
        start += len(batch)


def stored(work: Path, name: str, point: HookPoint | str) -> torch.Tensor:
    """The rows that `write` wrote, memory-mapped: `[num_rows, d]` bfloat16."""
    path = work / f"{name}.{point}.activations"
    size = path.stat().st_size // torch.bfloat16.itemsize
    rows = torch.from_file(str(path), size=size, dtype=torch.bfloat16)
    return rows.view(len(places(work, name, point)), -1)


def places(work: Path, name: str, point: HookPoint | str) -> torch.Tensor:
    """Window and position of each row: `[num_rows, 2]` int32."""
    path = work / f"{name}.{point}.places"
    size = path.stat().st_size // torch.int32.itemsize
    return torch.from_file(str(path), size=size, dtype=torch.int32).view(-1, 2)


def stored_pairs(
    work: Path, name: str, reads: HookPoint | str, writes: HookPoint | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of two hook points at the same tokens: `[num_rows, d_in]`, `[num_rows, d_out]`.

    Raises:
        ValueError: if the two were recorded at different tokens.
    """
    if not torch.equal(places(work, name, reads), places(work, name, writes)):
        raise ValueError(
            f"{work}: {name}.{reads} and {name}.{writes} are of different tokens; record both in "
            "one run, at hook points that leave out the same tokens"
        )
    return stored(work, name, reads), stored(work, name, writes)


def write(
    model: Any, tokenizer: Any, points: Sequence[HookPoint], work: Path, name: str
) -> dict[HookPoint, int]:
    """Write rows and places of the documents in ``NAME.jsonl``.

    Returns:
        The number of rows of each hook point.
    """
    rows = dict.fromkeys(points, 0)
    cuts = windows(tokenizer, read(work / f"{name}.jsonl"))
    tokens = sum(len(window.ids) for window in cuts)
    with ExitStack() as files:
        opened = [
            [
                files.enter_context((work / f"{name}.{point}.{what}").open("wb"))
                for what in ("activations", "places")
            ]
            for point in points
        ]
        for batch in extract(model, tokenizer, cuts, points):
            for point, (x, place), (x_file, place_file) in zip(points, batch, opened, strict=True):
                x_file.write(x.bfloat16().view(torch.int16).numpy().tobytes())
                place_file.write(place.int().numpy().tobytes())
                rows[point] += len(x)
            logger.info("%s: %s rows of %d tokens", name, [*rows.values()], tokens)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--hooks", type=parse_hook, nargs="+", default=[parse_hook(HOOK)])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    last = max(point.layer for point in arguments.hooks)
    model.layers = model.layers[: last + 1]  # nobody reads what comes after
    for name in ("corpus", "held_out"):
        write(model, tokenizer, arguments.hooks, arguments.work, name)


if __name__ == "__main__":
    main()
