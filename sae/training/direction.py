"""Write a control vector, by how much the stream differs between two sets of texts, as GGUF.

    python -m sae.training.direction --model FOLDER --positive FILE --negative FILE \\
        --output FILE.gguf [--layers LAYER ...]

FILE has one text a line. For each layer, `direction.LAYER` is the mean of the stream after it over
the tokens of the positive texts, less that of the negative ones (Marks and Tegmark 2023, "The
Geometry of Truth", call such a probe mass-mean; Rimsky et al. 2023 steer with it). A sequence's
first token, special tokens and attention sinks (as in the self-check, ten times the median norm)
take no part. Without `--layers` it is every layer but the first: llama.cpp knows no direction of
layer 0.

The file is what llama.cpp's `--control-vector` and this server read: `--sae
NAME=FILE.gguf,layer=LAYER`. `add` of 1 with `max_act` adds the vector as it is.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sae.card import HookPoint
from sae.self_check import SINK_FACTOR
from sae.training.activations import batches, recorded, windows
from sae.training.model_hooks import caught
from sae.training.texts import Document

logger = logging.getLogger(__name__)

#: The format's name in llama.cpp and repeng.
ARCHITECTURE = "controlvector"


def mean_stream(
    model: Any, tokenizer: Any, texts: Sequence[str], layers: Sequence[int]
) -> torch.Tensor:
    """The mean of the stream after each of the layers: `[layers, d_in]` float32.

    Args:
        model: the decoder, with its layers at ``model.layers``.
        tokenizer: its tokenizer.
        texts: one text or more.
        layers: counted from 0.

    Raises:
        ValueError: if no token of the texts counts.
    """
    points = [HookPoint(layer, "hook_resid_post") for layer in layers]
    rows: list[list[torch.Tensor]] = [[] for _ in points]
    cuts = windows(tokenizer, [Document("english", "", text) for text in texts])
    for batch, ids in batches(cuts, tokenizer.pad_token_id or 0):
        # Padding stands on the right and attention looks left: no mask is needed.
        streams = caught(
            model.layers, points, lambda ids=ids: model(input_ids=ids, use_cache=False)
        )
        for of_layer, x in zip(rows, streams, strict=True):
            of_layer.append(x[recorded(batch, ids, x, tokenizer.all_special_ids, None)].float())
    return torch.stack([_mean_without_sinks(torch.cat(of_layer)) for of_layer in rows])


def _mean_without_sinks(x: torch.Tensor) -> torch.Tensor:
    if len(x) == 0:
        raise ValueError("the texts hold no token that counts; give texts of more than one token")
    norms = x.norm(dim=1)
    return x[norms <= SINK_FACTOR * norms.median()].mean(dim=0)


def write(path: Path, by_layer: Mapping[int, torch.Tensor], model_type: str) -> None:
    """Write `[d_in]` vectors by their layer as llama.cpp and repeng do."""
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(by_layer))
    for layer, vector in by_layer.items():
        writer.add_tensor(f"direction.{layer}", vector.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_texts(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--positive", type=Path, required=True)
    parser.add_argument("--negative", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    layers = arguments.layers or range(1, model.config.num_hidden_layers)
    positive, negative = (
        mean_stream(model, tokenizer, read_texts(path), layers)
        for path in (arguments.positive, arguments.negative)
    )
    difference = dict(zip(layers, positive - negative, strict=True))
    write(arguments.output, difference, model.config.model_type)
    for layer, vector in difference.items():
        logger.info("direction.%d: norm %.1f", layer, vector.norm())


if __name__ == "__main__":
    main()
