"""A loaded SAE: what requests need to know about it, and what its edits depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from sae.features import FeatureTable
from sae.sae import SAE
from sae.solve import is_affine

#: The fields of a card on which no arithmetic depends; the others are part of the fingerprint.
_NO_ARITHMETIC: Final = frozenset(
    {"id", "source", "sha256", "error_term", "has_labels", "has_max_activations"}
)


@dataclass(frozen=True)
class LoadedSAE:
    """One opened SAE with its features' labels and statistics; it has what `SAEFacts` asks for.

    Attributes:
        sae: the opened SAE.
        features: labels and statistics.
    """

    sae: SAE
    features: FeatureTable

    @property
    def hook(self) -> str:
        return self.sae.card.hook

    @property
    def reads(self) -> str:
        return self.sae.card.reads

    @property
    def writes(self) -> tuple[str, ...]:
        return self.sae.card.writes

    @property
    def d_sae(self) -> int:
        return self.sae.card.d_sae

    @property
    def error_term(self) -> bool:
        return self.sae.card.error_term

    @property
    def affine(self) -> bool:
        """Whether pre-activations are affine in the stream that is edited."""
        card = self.sae.card
        return is_affine(card) and card.one_place

    def fingerprint(self, special_token_ids: Sequence[int] | None) -> str:
        """SHA-256 of all that this SAE's part in an edit depends on.

        That is weights, places, sinks, flags, and what its configuration and SAELens' registry say
        of scales and thresholds.

        Args:
            special_token_ids: the tokens that edits leave alone; None for the tokenizer's.

        Raises:
            SAEError: if the weight file has changed since it was opened.
        """
        sha256 = self.sae.sha256()
        card = {k: v for k, v in asdict(self.sae.card).items() if k not in _NO_ARITHMETIC}
        facts = [sha256, sorted(card.items()), self.sae.arithmetic, special_token_ids]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def max_activation(self, feature: int) -> float | None:
        """The recorded maximum activation in raw units; None if it is not known."""
        return self.features.max_activation(feature)
