"""Which features write in nearly the same direction."""

from __future__ import annotations

import torch

from sae.sae import SAE


def nearest(sae: SAE, latent: int, count: int = 10) -> list[tuple[int, float]]:
    """The latents whose decoder rows have the largest cosine with this one's, itself left out.

    cos(i, j) = W_dec_i . W_dec_j / (|W_dec_i| |W_dec_j|)

    Best first, ties by lower index; rows without a direction are near to nothing. One pass over
    W_dec in parts of the workspace. IndexError where the latent is not in [0, d_sae).
    """
    direction = sae.rows([latent]).W_dec[0]  # [d_in] float32
    length = direction.norm()
    if length == 0:
        return []
    best_cosines, best_latents = torch.empty(0), torch.empty(0, dtype=torch.long)
    for start, stop in sae.chunks():
        rows = sae.decoder_rows(start, stop)  # [stop - start, d_in] float32
        cosines = rows @ (direction / length) / rows.norm(dim=1)
        latents = torch.arange(start, stop)
        # A row without a direction gave 0 / 0.
        kept = (latents != latent) & cosines.isfinite()
        # Stable, and what is kept has lower indices than what comes: ties stay in order.
        cosines = torch.cat([best_cosines, cosines[kept]])
        order = cosines.sort(descending=True, stable=True).indices[:count]
        best_latents = torch.cat([best_latents, latents[kept]])[order]
        best_cosines = cosines[order]
    return list(zip(best_latents.tolist(), best_cosines.tolist(), strict=True))
