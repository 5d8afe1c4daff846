"""What makes a vLLM engine steer: its worker, its scheduler and its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sae.errors import SAEError
from sae.layers import resolve_all
from sae.sae import check_fits, open_sae
from sae.source import ResolvedSAE, SAEReference
from steering.config import CONFIG_KEY, DEFAULT_MAX_ROWS, RESIDENT_TURNS, SteeringConfig
from steering.request.catalog import SCAN_LIMIT_BYTES
from steering.request.limits import MAX_GATES, MAX_INTERVENTIONS
from steering.vllm.seams import refuse_missing_seams


def engine_arguments(config: SteeringConfig) -> dict[str, Any]:
    """Arguments that make a vLLM engine steer: ``LLM(model, **engine_arguments(config))``.

    The hook points are read from the SAEs' files, which may change while their paths stay the same.
    A graph that was compiled for other hook points must not come out of vLLM's cache, so they enter
    its hash beside the paths.

    Raises:
        UnsupportedEngineError: if the installed vLLM is not one that can be steered.
        SAEError: if an SAE's file does not hold what it should.
    """
    refuse_missing_seams()
    cards = [open_sae(ref).card for ref in config.saes]
    hook_points = sorted({hook for card in cards for hook in (card.reads, *card.writes)})
    most_writes = max((len(card.writes) for card in cards), default=1)
    if most_writes > 1:
        # One request's edits must always fit, and each has a row for each place where it is added.
        least = MAX_INTERVENTIONS * most_writes + MAX_GATES
        config = replace(config, max_rows=max(config.max_rows, least))
    return {
        "worker_cls": "steering.vllm.worker.SteeringWorker",
        "scheduler_cls": "steering.vllm.scheduler.SteeringScheduler",
        "additional_config": {CONFIG_KEY: {**config.to_dict(), "hook_points": hook_points}},
    }


def offline_config(
    saes: Sequence[str],
    model_config: Any,
    *,
    max_rows: int = DEFAULT_MAX_ROWS,
    max_read_values: int | None = None,
    resident: str = RESIDENT_TURNS,
) -> SteeringConfig:
    """The configuration of an engine that steers a model through SAEs, checked against it.

    Args:
        saes: each as ``--sae`` takes it, ``NAME=SOURCE[,hook=HOOK][,layer=L]...``.
        model_config: vLLM's ``ModelConfig``, which tells the model's hidden size and layers.
        max_rows: how many features may be in use at once over all running requests.
        max_read_values: see `SteeringConfig`.
        resident: see `SteeringConfig`.

    Raises:
        SAEError: if an SAE cannot be used, or cannot be used with this model.
    """
    d_model = int(model_config.get_hidden_size())
    num_layers = int(model_config.get_total_num_hidden_layers())
    references: dict[str, ResolvedSAE] = {}
    for reference in (each for flag in saes for each in resolve_all(SAEReference.parse(flag))):
        if reference.name in references:
            raise SAEError(f"two SAEs are named {reference.name!r}")
        sae = open_sae(reference)
        check_fits(sae.card, d_model, num_layers)
        if sae.weight_bytes <= SCAN_LIMIT_BYTES:
            sae.scan_nonfinite()
        references[reference.name] = reference
    return SteeringConfig(
        tuple(references.values()),
        d_model,
        num_layers,
        max_rows=max_rows,
        max_read_values=max_read_values,
        resident=resident,
    )
