"""Encoder and decoder rows of the features in use, on the device.

SAE weights stay memory-mapped on the host. A request names its features; their rows are copied
into a pool of fixed capacity when it is admitted, shared with every other request that names
them, and kept after its end until the room is needed (least recently used out first).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from sae.card import SAECard
from sae.sae import SAE

# Columns of `RowPool.params`. With z = W_enc @ x_normed: act = gain * z + bias, and the latent
# fires where act > threshold and z + gate_bias > 0.
P_BIAS, P_GAIN, P_THRESHOLD, P_GATE_BIAS, P_DECODER_SCALE, P_ENC_SUM, P_SINK, P_NORM = range(8)
NUM_PARAMS: Final = 8

# Values of the column P_NORM: how the SAE normalises its input.
NORM_NONE, NORM_LAYER, NORM_CONSTANT = range(3)
_NORM_CODES: Final = {
    "none": NORM_NONE,
    "layer_norm": NORM_LAYER,
    "constant_norm_rescale": NORM_CONSTANT,
}

Latent = tuple[int, int]  # (SAE index, latent index)


class RowPool:
    """A fixed number of device rows, reference-counted by the requests that use them.

    Attributes:
        W_enc: ``[capacity, d_in]`` float32, encoder rows.
        W_dec: ``[capacity, d_in]`` float32, decoder rows.
        params: ``[capacity, NUM_PARAMS]`` float32, what else an activation needs.
    """

    def __init__(
        self, saes: Sequence[SAE], capacity: int, d_in: int, device: torch.device | str
    ) -> None:
        self._saes = saes
        self.capacity = capacity
        self.W_enc = torch.zeros(capacity, d_in, dtype=torch.float32, device=device)
        self.W_dec = torch.zeros(capacity, d_in, dtype=torch.float32, device=device)
        self.params = torch.zeros(capacity, NUM_PARAMS, dtype=torch.float32, device=device)
        self._row: dict[Latent, int] = {}
        self._users: dict[Latent, int] = {}
        # Resident rows that nobody uses, oldest first.
        self._idle: OrderedDict[Latent, None] = OrderedDict()
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def rows_in_use(self) -> int:
        """Rows that some running request uses."""
        return len(self._users)

    def acquire(self, latents: Collection[Latent]) -> dict[Latent, int]:
        """Make rows resident, count one more user of each, and say where they are.

        The scheduler admits no request whose rows would not fit, so running out is our bug.
        """
        missing = [latent for latent in latents if latent not in self._row]
        for latent in latents:
            self._users[latent] = self._users.get(latent, 0) + 1
            self._idle.pop(latent, None)
        while len(self._free) < len(missing):
            assert self._idle, f"{len(self._users)} rows needed, capacity {self.capacity}"
            evicted, _ = self._idle.popitem(last=False)
            self._free.append(self._row.pop(evicted))
        for latent in missing:
            self._row[latent] = self._free.pop()
        self._upload(missing)
        return {latent: self._row[latent] for latent in latents}

    def release(self, latents: Iterable[Latent]) -> None:
        """Count one user less of each; rows without users stay until the room is needed."""
        for latent in latents:
            self._users[latent] -= 1
            if not self._users[latent]:
                del self._users[latent]
                self._idle[latent] = None

    def _upload(self, latents: Sequence[Latent]) -> None:
        by_sae: dict[int, list[int]] = {}
        for sae, latent in latents:
            by_sae.setdefault(sae, []).append(latent)
        for sae, members in by_sae.items():
            where = torch.tensor([self._row[sae, latent] for latent in members])
            rows = self._saes[sae].rows(members)
            params = torch.stack(
                [
                    rows.bias,
                    rows.gain,
                    rows.threshold,
                    rows.gate_bias,
                    rows.decoder_scale,
                    rows.W_enc.sum(dim=1, dtype=torch.float64).float(),
                    *_per_sae_params(self._saes[sae].card, len(members)),
                ],
                dim=1,
            )
            for target, source in (
                (self.W_enc, rows.W_enc),
                (self.W_dec, rows.W_dec),
                (self.params, params),
            ):
                # Stream order protects steps in flight: they read the old rows before this writes.
                target.index_copy_(0, where.to(target.device), source.to(target.device))


def _per_sae_params(card: SAECard, n: int) -> tuple[Tensor, Tensor]:
    sink_norm = torch.inf if card.sink_norm is None else card.sink_norm
    norm = _NORM_CODES[card.normalize_activations]
    return torch.full((n,), sink_norm), torch.full((n,), float(norm))
