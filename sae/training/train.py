"""Train the SAE on stored activations, with SAELens, and export it in SAELens format.

    python -m sae.training.train --model FOLDER --work FOLDER --output FOLDER [--tokens N]

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

from sae.training.activations import LAYER, SINK_NORM, WINDOW, stored

logger = logging.getLogger(__name__)

#: Activations are divided by this share of them all to estimate their mean norm.
NORM_SAMPLE: Final = 0.05


@dataclass(frozen=True)
class Recipe:
    """What is trained and for how long."""

    d_sae: int = 4608
    k: int = 32
    tokens: int = 2_800_000
    batch: int = 1024
    learning_rate: float = 6e-4
    warm_up: float = 0.04  # of all steps
    decay: float = 0.25  # of all steps, to a tenth
    #: Passes without firing after which the auxiliary loss takes a latent in hand.
    dead_after: int = 250
    seed: int = 0


def shuffled(rows: torch.Tensor, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches `[batch, d_in]` float32 for ever, each pass in a new order.

    What does not fill a batch at the end of a pass is left for the next.

    Raises:
        ValueError: there are fewer rows than one batch.
    """
    if len(rows) < batch:
        raise ValueError(f"{len(rows)} rows do not fill a batch of {batch}")
    chance = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=chance)
        for start in range(0, len(rows) - batch + 1, batch):
            yield rows[order[start : start + batch].sort().values].float()


def train(rows: torch.Tensor, recipe: Recipe) -> Any:
    """A `BatchTopKTrainingSAE` of SAELens, trained on `rows` `[num_rows, d_in]`.

    It is trained on rows less their mean, which its decoder bias takes back in the end (Bricken et
    al. 2023, "Towards Monosemanticity", start that bias at the data's centre for the same reason):
    the mean is half of these rows' second moment, and Adam moves a bias that starts at zero by
    its learning rate a step, so latents that fire on every token would carry the mean instead.

    Weights are float32. Under autocast the products are bfloat16, which takes 40% off a step on
    a CPU that has the instructions for it.
    """
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(recipe.seed)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=rows.shape[1],
            d_sae=recipe.d_sae,
            k=recipe.k,
            normalize_activations="expected_average_only_in",
        )
    )
    mean = rows.mean(dim=0, dtype=torch.float32)
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
            n_batches_for_norm_estimate=max(1, int(NORM_SAMPLE * len(rows)) // recipe.batch),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        (batch - mean for batch in shuffled(rows, recipe.batch, recipe.seed)),
    )
    trained = trainer.fit()
    trained.b_dec.data += mean
    return trained


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


def main() -> None:
    defaults = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=LAYER)
    parser.add_argument("--tokens", type=int, default=defaults.tokens)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    model = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))
    rows = stored(arguments.work, "corpus", model["hidden_size"])
    recipe = Recipe(tokens=arguments.tokens)
    sae = train(rows, recipe)
    arguments.output.mkdir(parents=True, exist_ok=True)
    export(
        sae,
        arguments.output,
        {
            "model_name": arguments.model.name,
            "hook_name": f"blocks.{arguments.layer}.hook_resid_post",
            "hook_head_index": None,
            "prepend_bos": False,
            "context_size": WINDOW,
            "sink_norm": SINK_NORM,
            "trained_as": "batchtopk",
            "k": recipe.k,
            "tokens_unique": len(rows),
            "tokens_seen": recipe.tokens,
        },
    )
    logger.info("%s", arguments.output)


if __name__ == "__main__":
    main()
