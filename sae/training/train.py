"""Train a dictionary on stored activations, with SAELens, and export it in SAELens format.

    python -m sae.training.train --model FOLDER --work FOLDER --output FOLDER [--tokens N]
        [--reads HOOK [--writes HOOK [--skip]]] [--d-sae N] [--k N]

The dictionary is an SAE of what was recorded at a hook point or, if it writes at another one than
it reads at, a transcoder, with a skip connection or without.

Why SAELens and not sparsify: its trainer takes any iterator of activation batches, so the corpus
goes through the model once and not once a pass; its BatchTopK is published as a JumpReLU, with
which one feature costs one encoder row; and it writes the format that most tools read. sparsify's
decoder is quicker on a CPU, but its trainer runs the model in every step, and its TopK needs
every latent to know one.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from sae.card import HEADS, HookPoint
from sae.hook_names import parse_hook
from sae.training.activations import HOOK, WINDOW, sink_norm, stored, stored_pairs

logger = logging.getLogger(__name__)

#: The share of all activations from which their mean norm is estimated.
NORM_SAMPLE: Final = 0.05
ROWS_AT_ONCE: Final = 8192


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how long."""

    d_sae: int = 4608
    k: int = 32
    tokens: int = 2_800_000
    batch: int = 1024
    learning_rate: float = 6e-4
    warm_up: float = 0.04  # of all steps
    decay: float = 0.25  # of all steps, to a tenth
    #: Passes without firing after which the auxiliary loss revives a latent.
    dead_after: int = 250
    seed: int = 0


def shuffled(rows: torch.Tensor, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches `[batch, d_in]` float32 for ever, each pass in a new order.

    What does not fill a batch at the end of a pass is left for the next.

    Raises:
        ValueError: if the rows do not fill one batch.
    """
    if len(rows) < batch:
        raise ValueError(f"{len(rows)} rows do not fill a batch of {batch}")
    chance = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=chance)
        for start in range(0, len(rows) - batch + 1, batch):
            yield rows[order[start : start + batch].sort().values].float()


def train(rows: torch.Tensor, recipe: Recipe, *, heads: bool = False) -> Any:
    """A `BatchTopKTrainingSAE` of SAELens, trained on `rows` `[num_rows, d_in]`.

    It is trained on rows less their mean, which its decoder bias takes back in the end (Bricken et
    al. 2023, "Towards Monosemanticity", start that bias at the data's centre for the same reason):
    the mean is half of these rows' second moment, and Adam moves a bias that starts at zero by
    its learning rate a step, so latents that fire on every token would carry the mean instead.

    Args:
        rows: what was recorded.
        recipe: what is trained and for how long.
        heads: whether the rows are attention's heads side by side, which TransformerLens gives to
            an SAE one by one.
    """
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    torch.manual_seed(recipe.seed)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=rows.shape[1],
            d_sae=recipe.d_sae,
            k=recipe.k,
            normalize_activations="expected_average_only_in",
            reshape_activations="hook_z" if heads else "none",
        )
    )
    mean = rows.mean(dim=0, dtype=torch.float32)
    batches = shuffled(rows, recipe.batch, recipe.seed)
    trained = _fitted(sae, (batch - mean for batch in batches), len(rows), recipe)
    trained.b_dec.data += mean
    return trained


def train_transcoder(
    rows: torch.Tensor, targets: torch.Tensor, recipe: Recipe, *, skip: bool = False
) -> Any:
    """A `sae.training.transcoder.Transcoder` of `targets` `[num_rows, d_out]` from `rows`.

    Both sides are brought to mean zero and a mean norm of the root of their width, as SAELens
    scales an SAE's input; means and factors are folded into its weights in the end.

    Args:
        rows: `[num_rows, d_in]`, what it reads.
        targets: what it is to write at the same tokens.
        recipe: what is trained and for how long.
        skip: whether it has a skip connection.
    """
    from sae.training.transcoder import Transcoder, TranscoderConfig

    torch.manual_seed(recipe.seed)
    d_in, d_out = rows.shape[1], targets.shape[1]
    sae = Transcoder(
        TranscoderConfig(
            d_in=d_in,
            d_out=d_out,
            d_sae=recipe.d_sae,
            k=recipe.k,
            skip=skip,
            apply_b_dec_to_input=False,
        )
    )
    x_mean, x_scale = _centre_and_scale(rows)
    y_mean, y_scale = _centre_and_scale(targets)
    pairs = zip(
        *(shuffled(side, recipe.batch, recipe.seed) for side in (rows, targets)), strict=True
    )
    batches = (torch.cat([(x - x_mean) * x_scale, (y - y_mean) * y_scale], dim=1) for x, y in pairs)
    trained = _fitted(sae, batches, len(rows), recipe)
    trained.fold_affine(x_mean, x_scale, y_mean, y_scale)
    return trained


def _centre_and_scale(rows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The mean of rows, `[d]` float32, and what brings the rest to a mean norm of sqrt(d)."""
    mean = rows.mean(dim=0, dtype=torch.float32)
    norms = [(part.float() - mean).norm(dim=1) for part in torch.split(rows, ROWS_AT_ONCE)]
    return mean, float(rows.shape[1] ** 0.5 / torch.cat(norms).mean())


def _fitted(sae: Any, batches: Iterator[torch.Tensor], num_rows: int, recipe: Recipe) -> Any:
    """`sae`, trained by SAELens' trainer.

    Weights are float32. Under autocast the products are bfloat16, which takes 40% off a step on
    a CPU that has the instructions for it.
    """
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps = recipe.tokens // recipe.batch
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * recipe.batch,
            train_batch_size_samples=recipe.batch,
            lr=recipe.learning_rate,
            lr_end=recipe.learning_rate / 10,
            lr_warm_up_steps=int(steps * recipe.warm_up),
            lr_decay_steps=int(steps * recipe.decay),
            autocast=True,
            dead_feature_window=recipe.dead_after,
            n_batches_for_norm_estimate=max(1, int(NORM_SAMPLE * num_rows) // recipe.batch),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        batches,
    )
    return trainer.fit()


def export(sae: Any, output: Path, metadata: dict[str, Any]) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` (jumprelu, float16) to `output`.

    SAELens folds the input scale and the decoder norms into the weights and puts the one threshold
    of BatchTopK in every row. Float16 keeps these weights better than bfloat16 does (their
    range is small), at half of float32's size.
    """
    whole = output / "whole"
    sae.save_inference_model(whole)
    config = json.loads((whole / "cfg.json").read_text(encoding="utf-8"))
    config["dtype"] = "float16"
    version = config["metadata"].get("sae_lens_version")
    config["metadata"] = {"sae_lens_version": version, **metadata}
    (output / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = load_file(whole / "sae_weights.safetensors")
    save_file(
        {name: tensor.half().contiguous() for name, tensor in weights.items()},
        output / "sae_weights.safetensors",
    )
    shutil.rmtree(whole)


def _stated(
    model: str, reads: HookPoint, writes: HookPoint, num_rows: int, recipe: Recipe
) -> dict[str, Any]:
    """What the configuration says of where the dictionary belongs and what it was made of."""
    places = {"hook_name": str(reads)} | ({} if writes == reads else {"hook_name_out": str(writes)})
    most = sink_norm(reads)
    return {
        "model_name": model,
        **places,
        "hook_head_index": None,
        "prepend_bos": False,
        "context_size": WINDOW,
        **({} if most is None else {"sink_norm": most}),
        "trained_as": "batchtopk",
        "k": recipe.k,
        "tokens_unique": num_rows,
        "tokens_seen": recipe.tokens,
    }


def main() -> None:
    defaults = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--reads", type=parse_hook, default=parse_hook(HOOK))
    parser.add_argument("--writes", type=parse_hook)
    parser.add_argument("--skip", action="store_true")
    parser.add_argument("--tokens", type=int, default=defaults.tokens)
    parser.add_argument("--d-sae", type=int, default=defaults.d_sae)
    parser.add_argument("--k", type=int, default=defaults.k)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    reads = arguments.reads
    writes = arguments.writes or reads
    if arguments.skip and writes == reads:
        parser.error(f"--skip: an SAE has no skip connection; state --writes other than {reads}")
    recipe = Recipe(tokens=arguments.tokens, d_sae=arguments.d_sae, k=arguments.k)
    if writes == reads:
        rows = stored(arguments.work, "corpus", reads)
        sae = train(rows, recipe, heads=reads.kind == HEADS)
    else:
        rows, targets = stored_pairs(arguments.work, "corpus", reads, writes)
        sae = train_transcoder(rows, targets, recipe, skip=arguments.skip)
    arguments.output.mkdir(parents=True, exist_ok=True)
    stated = _stated(arguments.model.name, reads, writes, len(rows), recipe)
    export(sae, arguments.output, stated)
    logger.info("%s", arguments.output)


if __name__ == "__main__":
    main()
