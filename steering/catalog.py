"""The SAEs that a server or an engine has, as requests see them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from sae.card import SAECard
from sae.errors import SAEError
from sae.features import FeatureTable
from sae.sae import SAE, open_sae
from steering.config import LEAST_MAX_READ_VALUES, SteeringConfig
from steering.errors import SteeringError
from steering.spec import SteeringSpec, parse_spec

#: Weights up to this size are scanned for non-finite values at start; larger ones row by row.
SCAN_LIMIT_BYTES = 10**9


@dataclass(frozen=True)
class LoadedSAE:
    """One opened SAE beside its features' labels and statistics."""

    sae: SAE
    features: FeatureTable

    @property
    def hook(self) -> str:
        return self.sae.card.hook

    @property
    def d_sae(self) -> int:
        return self.sae.card.d_sae

    def max_activation(self, feature: int) -> float | None:
        """The recorded maximum activation in raw units, None if unknown."""
        return self.features.max_activation(feature)


class Catalog:
    """The loaded SAEs by name, in the order of their indices. Opening costs headers only.

    Attributes:
        max_read_values: how many features one request may have read, over all its tokens.
    """

    def __init__(
        self, loaded: Mapping[str, LoadedSAE], max_read_values: int = LEAST_MAX_READ_VALUES
    ) -> None:
        self.max_read_values = max_read_values
        self._loaded = dict(loaded)
        # Rows already found finite, in SAEs too large to be scanned at start.
        self._checked: dict[str, set[int]] = {
            name: set()
            for name, item in self._loaded.items()
            if item.sae.weight_bytes > SCAN_LIMIT_BYTES
        }
        # What a scan of all of such an SAE found, where a request has needed one.
        self._scanned: dict[str, str | None] = {}

    @classmethod
    def from_config(cls, config: SteeringConfig | None, max_model_len: int = 0) -> Catalog:
        """Open every SAE of ``config``; an empty catalog for None.

        Args:
            config: what to serve.
            max_model_len: tokens of a context, where known; see `SteeringConfig.read_limit`.

        Raises:
            SAEError: if a file does not hold what it should.
        """
        if config is None:
            return cls({})
        loaded = {}
        for ref in config.saes:
            sae = open_sae(ref)
            loaded[ref.name] = LoadedSAE(sae, FeatureTable.open(ref.path, sae.card.d_sae))
        return cls(loaded, config.read_limit(max_model_len))

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the SAEs' indices."""
        return tuple(self._loaded)

    @cached_property
    def index(self) -> dict[str, int]:
        """Name to index, as plans name SAEs."""
        return {name: i for i, name in enumerate(self._loaded)}

    def card(self, name: str) -> SAECard:
        """The card of one SAE. Raises SteeringError ``unknown_sae``."""
        return self._get(name).sae.card

    def sae(self, name: str) -> SAE:
        """One SAE. Raises SteeringError ``unknown_sae``."""
        return self._get(name).sae

    def features(self, name: str) -> FeatureTable:
        """Labels and statistics of one SAE. Raises SteeringError ``unknown_sae``."""
        return self._get(name).features

    def parse(self, raw: object) -> SteeringSpec:
        """Validate a ``steering`` field against these SAEs. Raises SteeringError."""
        return parse_spec(raw, self._loaded)

    async def prepare(self, spec: SteeringSpec) -> None:
        """Do off the event loop what may read whole files: checksums and row checks.

        Raises:
            SteeringError: ``invalid_weights`` where a row holds NaN or infinity, or where a file
                has changed since it was opened.
        """
        self._refuse_changed(spec)
        pending = any(self.sae(name).card.sha256 is None for name in spec.saes)
        unchecked = any(edit.sae in self._checked for edit in spec.edits)
        if pending or unchecked or (spec.read is not None and spec.read.sae in self._checked):
            await asyncio.to_thread(self.prepare_now, spec)

    def prepare_now(self, spec: SteeringSpec) -> dict[str, str]:
        """Check the rows that ``spec`` needs and return the checksums of its SAEs.

        Raises:
            SteeringError: as `prepare`.
        """
        self._refuse_changed(spec)
        for i, edit in enumerate(spec.edits):
            self.check_row(edit.sae, edit.feature, f"steering.interventions[{i}].feature")
            if not self.sae(edit.sae).card.exact_from_row:
                self._check_all(edit.sae, f"steering.interventions[{i}].sae")
            elif not spec.error_term:
                self._check_all(edit.sae, "steering.error_term")
        if spec.read is not None:
            self._check_all(spec.read.sae, "steering.read")
        return {name: self._sha256(name) for name in spec.saes}

    def check_row(self, name: str, feature: int, param: str) -> None:
        """SteeringError ``invalid_weights`` where the weights of a feature are not finite."""
        checked = self._checked.get(name)
        if checked is None or feature in checked:
            return
        if self.sae(name).nonfinite_latents([feature]):
            raise SteeringError(
                "invalid_weights",
                f"the weights of feature {feature} of SAE {name!r} are not finite",
                param,
            )
        checked.add(feature)

    def _check_all(self, name: str, param: str) -> None:
        """The same for every row, where a request encodes or decodes in full."""
        if name not in self._checked:
            return
        if name not in self._scanned:
            try:
                self.sae(name).scan_nonfinite()
            except SAEError as error:
                self._scanned[name] = str(error)
            else:
                self._scanned[name] = None
        if self._scanned[name] is not None:
            raise SteeringError(
                "invalid_weights",
                f"SAE {name!r} has weights that are not finite, and this needs all of them",
                param,
            )

    def refuse_changed(self, name: str, param: str | None = None) -> None:
        """SteeringError ``invalid_weights`` where an SAE's file changed since it was opened."""
        with _unchanged(name, param):
            self.sae(name).refuse_changed()

    def _refuse_changed(self, spec: SteeringSpec) -> None:
        read = () if spec.read is None else (spec.read.sae,)
        for name in {*spec.saes, *read}:
            self.refuse_changed(name, "steering")

    def _sha256(self, name: str) -> str:
        with _unchanged(name, "steering"):
            return self.sae(name).sha256()

    def _get(self, name: str) -> LoadedSAE:
        if name not in self._loaded:
            loaded = ", ".join(self._loaded) or "none"
            raise SteeringError("unknown_sae", f"no SAE {name[:80]!r} is loaded, only: {loaded}")
        return self._loaded[name]


@contextmanager
def _unchanged(name: str, param: str | None) -> Iterator[None]:
    """Answer for a file that was written to as for weights that cannot be used."""
    try:
        yield
    except SAEError:
        raise SteeringError(
            "invalid_weights",
            f"the weight file of SAE {name!r} changed on disk while it was being served; the "
            "server has to be restarted",
            param,
        ) from None
