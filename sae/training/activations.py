"""The residual stream of the corpus after one layer, on disk, for the SAE to be trained on.

    python -m sae.training.activations --model FOLDER --work FOLDER [--layer N]

reads ``corpus.jsonl`` and ``held_out.jsonl``, and writes for each ``NAME.activations``, which is
``[num_rows, d_in]`` bfloat16, and ``NAME.places``, ``[num_rows, 2]`` int32: the window and the
position in it of each row. Reading the corpus once and training from disk is what makes several
passes cheap: on one core the model reads about 1,000 tokens a second.

Left out are the tokens that a served request does not steer either: a sequence's first, special
tokens, and attention sinks, whose norm is a hundred times the median and would be all the loss.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from sae.training.corpus import read
from sae.training.texts import Document

logger = logging.getLogger(__name__)

LAYER: Final = 14
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
    """Windows of about one length together, with their ids `[windows, length]` padded by `pad`."""
    start = 0
    while start < len(cuts):
        length = len(cuts[start].ids)
        batch = cuts[start : start + max(1, BATCH_TOKENS // length)]
        start += len(batch)
        rows = [window.ids + [pad] * (length - len(window.ids)) for window in batch]
        yield batch, torch.tensor(rows)


def recorded(
    batch: list[Window], ids: torch.Tensor, stream: torch.Tensor, special: list[int]
) -> torch.Tensor:
    """Which tokens count: `[windows, length]` bool.

    Args:
        batch: the windows.
        ids: `[windows, length]`.
        stream: `[windows, length, d_in]`, the residual stream.
        special: ids of special tokens.
    """
    position = torch.arange(ids.shape[1])
    first = torch.tensor([max(1, window.first) for window in batch])
    end = torch.tensor([len(window.ids) for window in batch])
    inside = (position >= first[:, None]) & (position < end[:, None])
    special_tokens = torch.isin(ids, torch.tensor(special, dtype=ids.dtype))
    ordinary: torch.Tensor = stream.float().norm(dim=-1) <= SINK_NORM
    return inside & ~special_tokens & ordinary


def residual_stream(layers: Any, layer: int, call: Any) -> torch.Tensor:
    """What `call` makes `layers[layer]` return: `[windows, length, d_in]`."""
    caught: list[torch.Tensor] = []

    def catch(module: object, inputs: object, output: Any) -> None:
        caught.append(output if isinstance(output, torch.Tensor) else output[0])

    handle = layers[layer].register_forward_hook(catch)
    try:
        with torch.inference_mode():
            call()
    finally:
        handle.remove()
    return caught[0]


def extract(
    model: Any, tokenizer: Any, cuts: list[Window], layer: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each batch its rows, `[num_recorded, d_in]`, and their places, `[num_recorded, 2]`."""
    start = 0
    for batch, ids in batches(cuts, tokenizer.pad_token_id or 0):
        # Padding stands on the right and attention looks left: no mask is needed.
        stream = residual_stream(
            model.layers, layer, lambda ids=ids: model(input_ids=ids, use_cache=False)
        )
        kept = recorded(batch, ids, stream, tokenizer.all_special_ids)
        yield stream[kept], kept.nonzero() + torch.tensor([start, 0])
        start += len(batch)


def stored(work: Path, name: str, d_in: int) -> torch.Tensor:
    """The rows that `write` wrote, memory-mapped: `[num_rows, d_in]` bfloat16."""
    path = work / f"{name}.activations"
    size = path.stat().st_size // torch.bfloat16.itemsize
    return torch.from_file(str(path), size=size, dtype=torch.bfloat16).view(-1, d_in)


def places(work: Path, name: str) -> torch.Tensor:
    """Window and position of each row: `[num_rows, 2]` int32."""
    path = work / f"{name}.places"
    size = path.stat().st_size // torch.int32.itemsize
    return torch.from_file(str(path), size=size, dtype=torch.int32).view(-1, 2)


def write(model: Any, tokenizer: Any, layer: int, work: Path, name: str) -> int:
    """Write rows and places of the documents in ``NAME.jsonl``.

    Returns:
        The number of rows.
    """
    rows = 0
    cuts = windows(tokenizer, read(work / f"{name}.jsonl"))
    tokens = sum(len(window.ids) for window in cuts)
    with (
        (work / f"{name}.activations").open("wb") as stream_file,
        (work / f"{name}.places").open("wb") as places_file,
    ):
        for stream, place in extract(model, tokenizer, cuts, layer):
            stream_file.write(stream.bfloat16().view(torch.int16).numpy().tobytes())
            places_file.write(place.int().numpy().tobytes())
            rows += len(stream)
            logger.info("%s: %d rows of %d tokens", name, rows, tokens)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=LAYER)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    model.layers = model.layers[: arguments.layer + 1]  # nobody reads what comes after
    for name in ("corpus", "held_out"):
        write(model, tokenizer, arguments.layer, arguments.work, name)


if __name__ == "__main__":
    main()
