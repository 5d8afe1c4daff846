"""The SAEs of the command line, opened and checked before anything else starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sae.card import SAECard
from sae.errors import SAEError
from sae.layers import resolve_all
from sae.sae import check_fits, open_sae
from sae.source import ResolvedSAE, SAEReference, resolve
from steering.request.catalog import SCAN_LIMIT_BYTES

logger = logging.getLogger("vllm.sae.server")


@dataclass(frozen=True)
class CheckedSAE:
    """A resolved reference, and the card of what it led to."""

    reference: ResolvedSAE
    card: SAECard


def check(flag: str) -> list[CheckedSAE]:
    """Open what one `--sae` flag names: one dictionary, or with `layer=all` one for each layer.

    Raises:
        SAEError: for every misfit that the files alone show.
    """
    return check_all(SAEReference.parse(flag), scan_limit=SCAN_LIMIT_BYTES)


def check_all(reference: SAEReference, scan_limit: int | None) -> list[CheckedSAE]:
    """As `check_reference`, for every dictionary that the reference stands for."""
    with unforeseen_refused(reference.source):
        resolved = resolve_all(reference)
    return [check_reference(each, scan_limit) for each in resolved]


def check_reference(reference: SAEReference | ResolvedSAE, scan_limit: int | None) -> CheckedSAE:
    """Open an SAE and read its labels; scan its weights unless they are larger than the limit.

    Args:
        reference: to one dictionary.
        scan_limit: in bytes; None for no limit.

    Raises:
        SAEError: for every misfit that the files show.
    """
    with unforeseen_refused(reference.source):
        resolved = resolve(reference)
        sae = open_sae(resolved)
        sae.open_features().load()
        if scan_limit is None or sae.weight_bytes <= scan_limit:
            sae.scan_nonfinite()
    for remark in sae.remarks:
        logger.warning("%s", SAEError(remark))
    return CheckedSAE(resolved, sae.card)


@contextmanager
def unforeseen_refused(source: str) -> Iterator[None]:
    """Turn every other exception into an SAEError: files can be wrong in unforeseen ways."""
    try:
        yield
    except SAEError:
        raise
    except Exception as error:
        raise SAEError(f"{source}: {type(error).__name__}: {error}") from error


def refuse_equal_names(checked: Sequence[CheckedSAE]) -> None:
    """Raises SAEError if two SAEs have one name: requests could not tell them apart."""
    seen: dict[str, str] = {}
    for sae in checked:
        name, source = sae.card.id, sae.card.source
        if name in seen:
            raise SAEError(f"two SAEs are named {name!r}: {seen[name]} and {source}")
        seen[name] = source


def check_fit(checked: Sequence[CheckedSAE], model_config: Any) -> tuple[int, int]:
    """Hidden size and number of layers of a vLLM model. Raises SAEError if an SAE does not fit."""
    d_model = int(model_config.get_hidden_size())
    num_layers = int(model_config.get_total_num_hidden_layers())
    for sae in checked:
        check_fits(sae.card, d_model, num_layers)
    return d_model, num_layers
