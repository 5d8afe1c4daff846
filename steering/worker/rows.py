"""Encoder and decoder rows of the features in use, on the device.

SAE weights stay memory-mapped on the host. When a request enters the batch, the rows of the
features that it names are copied into a pool of fixed capacity. Requests that need the same rows
share them, and rows stay after their last request until the room is needed; the least recently used
make room first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from sae.card import SAECard
from sae.sae import SAE, LatentRows
from sae.solve import solve
from steering.request.plan import RowKey
from steering.worker.ops.layout import NORM_CONSTANT, NORM_LAYER, NORM_NONE, NUM_PARAMS

_NORM_CODES: Final = {
    "none": NORM_NONE,
    "layer_norm": NORM_LAYER,
    "constant_norm_rescale": NORM_CONSTANT,
}


class Rows(Protocol):
    """Rows on the device as a hook point sees them.

    Attributes:
        W_enc: ``[capacity, d]`` float32, encoder rows, each contiguous.
        W_dec: ``[capacity, d]`` float32, decoder rows, with the same strides.
        params: ``[capacity, NUM_PARAMS]`` float32, what else an activation needs (``P_*`` in
            `layout`).
    """

    @property
    def W_enc(self) -> Tensor: ...

    @property
    def W_dec(self) -> Tensor: ...

    @property
    def params(self) -> Tensor: ...


class RowColumns(NamedTuple):
    """The columns of the pool that a hook point's stream has; see `Rows`."""

    W_enc: Tensor
    W_dec: Tensor
    params: Tensor


class RowPool:
    """A fixed number of device rows, reference-counted by the requests that use them.

    Args:
        saes: every served SAE.
        capacity: how many rows there are.
        width: elements of the longest row.
        device: where the model runs.

    Attributes:
        W_enc: ``[capacity, width]`` float32, encoder rows, shorter ones padded with zeros.
        W_dec: ``[capacity, width]`` float32, decoder rows, likewise.
        params: ``[capacity, NUM_PARAMS]`` float32, see `Rows`.
    """

    def __init__(
        self, saes: Sequence[SAE], capacity: int, width: int, device: torch.device | str
    ) -> None:
        self._saes = saes
        self.capacity = capacity
        self.W_enc = torch.zeros(capacity, width, dtype=torch.float32, device=device)
        self.W_dec = torch.zeros(capacity, width, dtype=torch.float32, device=device)
        self.params = torch.zeros(capacity, NUM_PARAMS, dtype=torch.float32, device=device)
        self._row: dict[RowKey, int] = {}
        self._users: dict[RowKey, int] = {}
        # Resident rows that nobody uses, oldest first.
        self._idle: OrderedDict[RowKey, None] = OrderedDict()
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def rows_in_use(self) -> int:
        """How many rows running requests use."""
        return len(self._users)

    def columns(self, start: int, stop: int) -> RowColumns:
        """Elements ``[start, stop)`` of every row, as views."""
        return RowColumns(self.W_enc[:, start:stop], self.W_dec[:, start:stop], self.params)

    def acquire(self, keys: Collection[RowKey]) -> dict[RowKey, int]:
        """Make rows resident, count one more user of each, and return their places in the pool.

        The scheduler admits no request whose rows would not fit, so running out is our bug.
        """
        missing = [key for key in keys if key not in self._row]
        for key in keys:
            self._users[key] = self._users.get(key, 0) + 1
            self._idle.pop(key, None)
        while len(self._free) < len(missing):
            assert self._idle, f"{len(self._users)} rows needed, capacity {self.capacity}"
            evicted, _ = self._idle.popitem(last=False)
            self._free.append(self._row.pop(evicted))
        for key in missing:
            self._row[key] = self._free.pop()
        self._upload(missing)
        return {key: self._row[key] for key in keys}

    def release(self, keys: Iterable[RowKey]) -> None:
        """Count one user less of each row; unused rows stay until the room is needed."""
        for key in keys:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self._idle[key] = None

    def _upload(self, keys: Sequence[RowKey]) -> None:
        """Copy rows to the device, those that are made together in one copy."""
        together: dict[RowKey, list[RowKey]] = {}
        for key in keys:
            together.setdefault(key._replace(latent=0), []).append(key)
        for members in together.values():
            where = torch.tensor([self._row[key] for key in members])
            rows = self._made(members)
            params = torch.stack(
                [
                    rows.bias,
                    rows.gain,
                    rows.threshold,
                    rows.gate_bias,
                    rows.decoder_scale,
                    rows.W_enc.sum(dim=1, dtype=torch.float64).float(),
                    *_per_sae_params(self._saes[members[0].sae].card, len(members)),
                ],
                dim=1,
            )
            for target, source in (
                (self.W_enc, _widened(rows.W_enc, self.W_enc.shape[1])),
                (self.W_dec, _widened(rows.W_dec, self.W_dec.shape[1])),
                (self.params, params),
            ):
                # Stream order protects steps in flight: they read the old rows before this writes.
                target.index_copy_(0, where.to(target.device), source.to(target.device))

    def _made(self, members: Sequence[RowKey]) -> LatentRows:
        """Rows of one SAE: its own rows, or rows solved for the edits of a request.

        The members share everything but their latent; see `RowKey`.
        """
        first = members[0]
        sae = self._saes[first.sae]
        latents = [key.latent for key in members]
        rows = sae.rows(latents, first.write)
        hook = sae.card.hook
        protected = [
            (self._saes[index], latent)
            for index, latent in first.protected
            if self._saes[index].card.hook == hook
        ]
        if not first.solved_with and not protected:
            return rows
        made_with = list(first.solved_with) or latents
        solved = solve(sae, made_with, protected, reread=bool(first.solved_with)).W_dec
        return replace(
            rows,
            W_dec=solved[[made_with.index(latent) for latent in latents]],
            decoder_scale=torch.ones_like(rows.decoder_scale),
        )


def _widened(rows: Tensor, width: int) -> Tensor:
    """Pad rows with zeros: their places may have held longer ones before."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))


def _per_sae_params(card: SAECard, n: int) -> tuple[Tensor, Tensor]:
    sink_norm = torch.inf if card.sink_norm is None else card.sink_norm
    norm = _NORM_CODES[card.normalize_activations]
    return torch.full((n,), sink_norm), torch.full((n,), float(norm))
