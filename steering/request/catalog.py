"""The SAEs that a server or an engine has, as requests see them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from sae.card import SAECard
from sae.errors import SAEError
from sae.features import FeatureTable
from sae.sae import SAE, open_sae
from sae.solve import IllConditionedError, Solved, solve
from steering.config import LEAST_MAX_READ_VALUES, SteeringConfig
from steering.errors import SteeringError
from steering.request.condition_rules import refuse_across_stages
from steering.request.engine_limits import EngineLimits
from steering.request.facts import unknown_sae
from steering.request.loaded_sae import LoadedSAE
from steering.request.parse import parse_spec
from steering.request.spec import SteeringSpec

#: Weights up to this size are scanned for non-finite values at start; larger ones row by row.
SCAN_LIMIT_BYTES = 10**9

#: The limits of an engine that has one pipeline stage and decodes token by token.
NO_LIMITS: Final = EngineLimits()
#: How many sets of edits are remembered as solvable together.
MAX_SOLVABLE: Final = 4096


@dataclass(frozen=True)
class Prepared:
    """What the weights say about a valid request.

    Attributes:
        fingerprints: fingerprints of the SAEs in its ``kv_saes``, by name: SAEs with equal ones
            make equal edits.
        protected: what ``protect`` leaves of its edits, ``norm_kept`` and ``gain_kept`` as a report
            has them; None if nothing is protected or no report was asked for.
    """

    fingerprints: Mapping[str, str]
    protected: Mapping[str, float | None] | None = None


class Catalog:
    """The loaded SAEs by name, in the order of their indices. Opening costs headers only.

    Args:
        loaded: the SAEs by name.
        max_read_values: how many features one request may have read, over all its tokens.
        special_token_ids: tokens that edits leave alone; None for those of the model's tokenizer.
        limits: what the engine cannot do, the way it is served.
    """

    def __init__(
        self,
        loaded: Mapping[str, LoadedSAE],
        max_read_values: int = LEAST_MAX_READ_VALUES,
        special_token_ids: Sequence[int] | None = None,
        limits: EngineLimits = NO_LIMITS,
    ) -> None:
        self.max_read_values = max_read_values
        self.limits = limits
        self.special_token_ids = special_token_ids
        self._fingerprints: dict[str, str] = {}
        self._loaded = dict(loaded)
        # Rows already found finite, in SAEs too large to be scanned at start.
        self._checked: dict[str, set[int]] = {
            name: set()
            for name, item in self._loaded.items()
            if item.sae.weight_bytes > SCAN_LIMIT_BYTES
        }
        self._solvable: set[tuple[str, frozenset[int], frozenset[int]]] = set()
        self._stream_norms: dict[str, float] = {}
        # What a scan of all rows of such an SAE found, if a request has needed one.
        self._scanned: dict[str, str | None] = {}

    @classmethod
    def from_config(
        cls,
        config: SteeringConfig | None,
        max_model_len: int = 0,
        limits: EngineLimits = NO_LIMITS,
    ) -> Catalog:
        """Open every SAE of ``config``; an empty catalog for None.

        Args:
            config: what to serve.
            max_model_len: tokens of a context, if known; see `SteeringConfig.read_limit`.
            limits: what the engine cannot do, the way it is served.

        Raises:
            SAEError: if a file does not hold what it should.
        """
        if config is None:
            return cls({})
        loaded = {}
        for ref in config.saes:
            sae = open_sae(ref)
            loaded[ref.name] = LoadedSAE(sae, sae.open_features())
        limit = config.read_limit(max_model_len)
        return cls(loaded, limit, config.special_token_ids, limits)

    @property
    def names(self) -> tuple[str, ...]:
        """The SAEs' names, in the order of their indices."""
        return tuple(self._loaded)

    @cached_property
    def index(self) -> dict[str, int]:
        """Name to index, as plans name SAEs."""
        return {name: i for i, name in enumerate(self._loaded)}

    @cached_property
    def writes(self) -> dict[str, int]:
        """Name to the number of hook points at which its edits are added."""
        return {name: len(item.writes) for name, item in self._loaded.items()}

    def card(self, name: str) -> SAECard:
        """The card of one SAE. Raises SteeringError ``unknown_sae`` if it is not loaded."""
        return self._get(name).sae.card

    def sae(self, name: str) -> SAE:
        """One SAE. Raises SteeringError ``unknown_sae`` if it is not loaded."""
        return self._get(name).sae

    def features(self, name: str) -> FeatureTable:
        """One SAE's labels and statistics. Raises SteeringError ``unknown_sae`` if not loaded."""
        return self._get(name).features

    def stream_norm(self, name: str) -> float | None:
        """The median norm of the stream that an SAE edits; None if nothing has measured it."""
        return self._stream_norms.get(name)

    def note_stream_norm(self, name: str, norm: float) -> None:
        """Remember the median norm of the stream at the hook point that an SAE reads.

        It is ignored for an SAE that writes elsewhere: it says nothing about the stream there.
        """
        loaded = self._get(name)
        if loaded.writes == (loaded.reads,):
            self._stream_norms[name] = norm

    def parse(self, raw: object, *, empty_allowed: bool = False) -> SteeringSpec:
        """Validate a ``steering`` field against these SAEs and this engine; see `parse_spec`.

        Raises:
            SteeringError: if the field is not valid, with the code and path of what is wrong.
        """
        spec = parse_spec(raw, self._loaded, empty_allowed=empty_allowed)
        edits = ((edit.sae, edit.when) for edit in spec.edits)
        refuse_across_stages(edits, self._loaded, self.limits.stage_of)
        self.limits.refuse(spec, self.card)
        return spec

    async def prepare(self, spec: SteeringSpec) -> Prepared:
        """Like `prepare_now`, but off the event loop if it may read whole files.

        Raises:
            SteeringError: ``invalid_weights`` if a row holds NaN or infinity, or if a file has
                changed since it was opened; ``ill_conditioned`` if edits cannot be solved together.
        """
        unknown = any(name not in self._fingerprints for name in spec.kv_saes)
        unchecked = not self._checked.keys().isdisjoint(spec.all_saes)
        if unknown or unchecked or spec.reread or spec.protect:
            return await asyncio.to_thread(self.prepare_now, spec)
        return self.prepare_now(spec)

    def prepare_now(self, spec: SteeringSpec) -> Prepared:
        """Check the rows that ``spec`` needs and fingerprint the SAEs that its edits depend on.

        Raises:
            SteeringError: as `prepare` does.
        """
        self._refuse_changed(spec)
        for i, edit in enumerate(spec.edits):
            path = f"steering.interventions[{i}]"
            self._check_feature(edit.sae, edit.feature, f"{path}.feature", f"{path}.sae")
            if not spec.error_term:
                self._check_all(edit.sae, "steering.error_term")
            if edit.when is not None:
                for condition in edit.when.conditions:
                    self._check_feature(condition.sae, condition.feature, edit.when.path)
        for condition in spec.stop_when:
            self._check_feature(condition.sae, condition.feature, "steering.stop_when")
        for i, (name, feature) in enumerate(spec.protect):
            self.check_row(name, feature, f"steering.protect[{i}]")
        if spec.read is not None:
            self._check_all(spec.read.sae, "steering.read")
        if spec.reread:
            self._refuse_unsolvable(spec)
        return Prepared(
            {name: self._fingerprint(name) for name in spec.kv_saes},
            self._protected(spec) if spec.report and spec.protect else None,
        )

    async def prepare_whole(self, name: str, param: str | None = None) -> None:
        """Check an SAE that is to be encoded in full, off the event loop if all of it is read.

        Args:
            name: name of the SAE.
            param: the path that a refusal names.

        Raises:
            SteeringError: ``unknown_sae`` if it is not loaded; ``invalid_weights`` as in `prepare`;
                ``unsupported_combination`` as in `EngineLimits.refuse_whole`.
        """
        self.limits.refuse_whole(name, param)
        self.refuse_changed(name, param)
        if name in self._checked and name not in self._scanned:
            await asyncio.to_thread(self._check_all, name, param)
        else:
            self._check_all(name, param)

    def _refuse_unsolvable(self, spec: SteeringSpec) -> None:
        """Raise SteeringError ``ill_conditioned`` if some SAE's edits cannot be solved together."""
        for name in spec.saes:
            edited = frozenset(edit.feature for edit in spec.edits if edit.sae == name)
            protected = frozenset(feature for sae, feature in spec.protect if sae == name)
            key = (name, edited, protected)
            if key in self._solvable:
                continue
            try:
                self._solved(name, edited, protected, reread=True)
            except IllConditionedError as error:
                raise SteeringError("ill_conditioned", str(error), "steering.match") from None
            if len(self._solvable) >= MAX_SOLVABLE:
                self._solvable.clear()
            self._solvable.add(key)

    def _protected(self, spec: SteeringSpec) -> dict[str, float | None]:
        """Means over the edits of what ``protect`` leaves of each.

        All is left of an edit whose SAE has no protected feature.
        """
        norms: list[float | None] = []
        gains: list[float | None] = []
        for name in spec.saes:
            edited = [edit.feature for edit in spec.edits if edit.sae == name]
            protected = {feature for sae, feature in spec.protect if sae == name}
            if not protected:
                norms += [1.0] * len(edited)
                gains += [1.0] * len(edited)
                continue
            distinct = sorted(set(edited))
            solved = self._solved(name, distinct, protected, reread=False)
            norms += [solved.norm_kept[distinct.index(feature)] for feature in edited]
            gains += [solved.gain_kept[distinct.index(feature)] for feature in edited]
        return {"norm_kept": _mean(norms), "gain_kept": _mean(gains)}

    def _solved(
        self, name: str, edited: Iterable[int], protected: Iterable[int], *, reread: bool
    ) -> Solved:
        sae = self.sae(name)
        beside = [(sae, feature) for feature in sorted(protected)]
        return solve(sae, sorted(edited), beside, reread=reread)

    def _check_feature(self, name: str, feature: int, param: str, whole: str | None = None) -> None:
        """Check what the activation of one feature needs: its row, or for top-k all rows.

        If the row of another feature is at fault, the refusal names the path ``whole``, which is
        ``param`` if it is left out.
        """
        self.check_row(name, feature, param)
        if not self.sae(name).card.exact_from_row:
            self._check_all(name, whole or param)

    def check_row(self, name: str, feature: int, param: str) -> None:
        """Raise SteeringError ``invalid_weights`` if the weights of a feature are not finite."""
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

    def _check_all(self, name: str, param: str | None) -> None:
        """`check_row` for every row, for a request that encodes or decodes in full."""
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
        """Raise SteeringError ``invalid_weights`` if an SAE's file changed since it was opened."""
        with _unchanged(name, param):
            self.sae(name).refuse_changed()

    def _refuse_changed(self, spec: SteeringSpec) -> None:
        for name in spec.all_saes:
            self.refuse_changed(name, "steering")

    def _fingerprint(self, name: str) -> str:
        if name not in self._fingerprints:
            with _unchanged(name, "steering"):
                made = self._get(name).fingerprint(self.special_token_ids)
            self._fingerprints[name] = made
        return self._fingerprints[name]

    def _get(self, name: str) -> LoadedSAE:
        if name not in self._loaded:
            raise unknown_sae(name, self._loaded)
        return self._loaded[name]


@contextmanager
def _unchanged(name: str, param: str | None) -> Iterator[None]:
    """Refuse with ``invalid_weights`` if the SAE's file turns out to have changed."""
    try:
        yield
    except SAEError:
        raise SteeringError(
            "invalid_weights",
            f"the weight file of SAE {name!r} changed on disk while it was being served; the "
            "server has to be restarted",
            param,
        ) from None


def _mean(ratios: Iterable[float | None]) -> float | None:
    """The mean of the ratios that are defined; None if none is."""
    defined = [ratio for ratio in ratios if ratio is not None]
    return sum(defined) / len(defined) if defined else None
