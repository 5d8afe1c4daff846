"""`vllm-sae import-labels`: labels and statistics of Neuronpedia, beside an SAE's weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sae.errors import SAEError
from sae.features import FeatureTable
from sae.files import FEATURES_NAME, find_weights, is_weight_file
from sae.neuronpedia import import_neuronpedia
from sae.sae import open_sae
from sae.self_check import stated_by
from sae.source import parse_source, resolve
from server.start.checked_sae import unforeseen_refused


def import_labels(source: str, exports: Sequence[str], force: bool = False) -> int:
    """Write what the exports know of an SAE's features; returns the exit code, 0 or 1.

    Args:
        source: `SOURCE[,hook=..]`.
        exports: folders of one Neuronpedia source, and files of it.
        force: take them even if they are of another model, layer or size.
    """
    try:
        with unforeseen_refused(source):
            resolved = resolve(parse_source(source))
            sae = open_sae(resolved)
            # Units are converted by the weights: one that is not finite would damage what is
            # written.
            sae.scan_nonfinite()
        out = features_path(Path(resolved.path), resolved.layer)
        parts = [Path(export) for export in exports]
        summary = import_neuronpedia(
            parts,
            out,
            sae.card,
            sae.decoder_row_norms().tolist(),
            model=stated_by(resolved, exactly_k=True).model,
            force=force,
        )
        FeatureTable(out, sae.card.d_sae).load()
    except (SAEError, OSError) as error:
        print(f"vllm-sae: {error}", file=sys.stderr)
        return 1
    print(
        f"{out}: {summary.features} of {sae.card.d_sae} features, {summary.labels} labels, "
        f"{summary.max_activations} maximum activations"
    )
    return 0


def features_path(source: Path, layer: int | None = None) -> Path:
    """The file beside the weights that a server reads, whether it is there yet or not.

    If the folder holds other weights too, it is a file for these weights alone. `layer` chooses one
    of a set of layers.
    """
    weights = find_weights(source, layer)
    files = [path for path in weights.parent.iterdir() if path.is_file()]
    if sum(is_weight_file(path.name) for path in files) > 1:
        return weights.with_name(f"{weights.name}.{FEATURES_NAME}")
    known = FeatureTable.open(weights, 1).path
    return known if known is not None else weights.with_name(FEATURES_NAME)
