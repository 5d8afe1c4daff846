"""Which features write in nearly the same direction, and which read what one writes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from sae.sae import SAE


def nearest(sae: SAE, latent: int, count: int = 10) -> list[tuple[int, float]]:
    """The latents whose decoder rows have the largest cosine with this one's, itself left out.

    cos(i, j) = W_dec_i . W_dec_j / (|W_dec_i| |W_dec_j|)

    Best first, ties by lower index; a row of zeros is near to nothing. W_dec is read once, in parts
    that fit the workspace.

    Raises:
        IndexError: if the latent is not in [0, d_sae).
    """
    if not 0 <= latent < sae.card.d_sae:
        raise IndexError(f"latent {latent} not in [0, {sae.card.d_sae})")
    # Of a dictionary that writes at several places, what it writes in all.
    direction = sae.decoder_rows(latent, latent + 1)[0]  # [d_out] float32
    length = direction.norm()
    if length == 0:
        return []
    best_cosines, best_latents = torch.empty(0), torch.empty(0, dtype=torch.long)
    for start, stop in sae.chunks():
        rows = sae.decoder_rows(start, stop)  # [stop - start, d_out] float32
        cosines = rows @ (direction / length) / rows.norm(dim=1)
        latents = torch.arange(start, stop)
        # A row of zeros gave 0 / 0.
        kept = (latents != latent) & cosines.isfinite()
        # Stable, and what is kept has lower indices than what comes: ties stay in order.
        cosines = torch.cat([best_cosines, cosines[kept]])
        order = cosines.sort(descending=True, stable=True).indices[:count]
        best_latents = torch.cat([best_latents, latents[kept]])[order]
        best_cosines = cosines[order]
    return list(zip(best_latents.tolist(), best_cosines.tolist(), strict=True))


def interference(
    sae: SAE, latent: int, count: int = 10
) -> tuple[float | None, list[tuple[int, float]]]:
    """What one unit of a latent's activation, once written, adds to pre-activations.

    G_ij = gain_i W_enc_i . W_dec_j decoder_scale_j, every scale of the SAE folded in

    Returns:
        G_jj, the latent's own, and `[(i, G_ij)]` of the `count` others that move most by size,
        largest first, ties by lower index. None and an empty list if the SAE reads another width
        than it writes. The weights are read once, in parts that fit the workspace.

    Raises:
        IndexError: if the latent is not in [0, d_sae).
    """
    row = sae.rows([latent])
    written = row.W_dec[0] * row.decoder_scale  # [d_out] float32
    if row.W_enc.shape[1] != len(written):
        return None, []
    self_gain = float(row.gain * (row.W_enc[0] @ written))
    return self_gain, most_moved(sae, written, [latent], count)


def most_moved(
    sae: SAE, written: Tensor, left_out: Collection[int], count: int = 10
) -> list[tuple[int, float]]:
    """The latents whose pre-activations a change of the stream moves most.

    Args:
        sae: one that reads the width of `written`.
        written: ``[d_in]`` float32, the change.
        left_out: latents that are not to be returned.
        count: how many to return.

    Returns:
        `[(i, gain_i W_enc_i . written)]` by size, largest first, ties by lower index. The weights
        are read once, in parts that fit the workspace.
    """
    skipped = torch.tensor(sorted(left_out), dtype=torch.long)
    best_changes, best_latents = torch.empty(0), torch.empty(0, dtype=torch.long)
    # A part holds both matrices, and a copy of one in float64 from which `rows` makes the vectors.
    for start, stop in sae.chunks(16 * len(written)):
        rows = sae.rows(range(start, stop))
        changes = rows.gain * (rows.W_enc @ written)  # [stop - start]
        latents = torch.arange(start, stop)
        kept = ~torch.isin(latents, skipped) & changes.isfinite()
        changes = torch.cat([best_changes, changes[kept]])
        order = changes.abs().sort(descending=True, stable=True).indices[:count]
        best_latents = torch.cat([best_latents, latents[kept]])[order]
        best_changes = changes[order]
    return list(zip(best_latents.tolist(), best_changes.tolist(), strict=True))
