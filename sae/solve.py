"""Decoder rows solved so that an edit is what the SAE, run again on the edited stream, reads.

For latents whose pre-activation p is affine in the stream, with gain, decoder scale and the SAE's
own scale folded into the rows::

    G_ij    = W_enc[i] . W_dec[j]              p changes by G alpha when the stream changes by
                                               sum_j alpha_j W_dec[j]
    alpha   = inverse(G) (p' - p)
    D~_i    = sum_j inverse(G)[j, i] W_dec[j]  so that the stream gains sum_i (p'_i - p_i) D~_i

Protected features keep their pre-activations: each W_dec[j] is replaced first by its part that is
orthogonal to their encoder rows. All in float64; the float32 of the results is the last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sae.card import SAECard
from sae.errors import SAEError
from sae.sae import SAE

#: The least diagonal entry of G with which an edit is solved.
LEAST_GAIN: Final = 0.2
#: The largest condition number of G with which an edit is solved.
MOST_CONDITION: Final = 1e4
#: Architectures whose pre-activation is affine in the stream and alone decides the activation.
_AFFINE: Final = frozenset({"standard", "jumprelu", "direction"})

LatentOf = tuple[SAE, int]


class IllConditionedError(SAEError):
    """An edit that cannot be solved.

    What it writes hardly moves what is read, or hardly tells two of the features apart.
    """


@dataclass(frozen=True)
class Solved:
    """Decoder rows in place of an SAE's own, and what became of them.

    Attributes:
        W_dec: ``[n, d_in]`` float32, with the decoder's scale folded in.
        norm_kept: ``|new W_dec| / |W_dec|`` of each latent: what `protected` left of it; None
            if that is 0 / 0.
        gain_kept: ``new G_jj / G_jj`` of each latent; None if G_jj is 0.
    """

    W_dec: Tensor
    norm_kept: list[float | None]
    gain_kept: list[float | None]


def is_affine(card: SAECard) -> bool:
    """Whether `solve` is defined: each pre-activation is affine in the stream that is edited."""
    return card.architecture in _AFFINE and card.normalize_activations == "none"


def solve(
    sae: SAE, latents: Sequence[int], protected: Sequence[LatentOf] = (), *, reread: bool
) -> Solved:
    """Rows for edits of these latents together.

    Args:
        sae: one for which `is_affine` holds.
        latents: those that the edits at this SAE name, distinct.
        protected: features of SAEs at the same hook point, for which `is_affine` holds too.
        reread: solve for what is read again; else the rows are only made to spare ``protected``.

    Raises:
        IllConditionedError: with ``reread``, if a diagonal entry of G is below `LEAST_GAIN` or the
            condition number of G above `MOST_CONDITION`.
    """
    W_enc, W_dec = _folded(sae, latents)
    kept = _orthogonal(W_dec, protected)
    found = _reread_rows(sae.card.id, latents, W_enc, kept) if reread else kept
    return Solved(
        found.float(),
        norm_kept=_ratios(kept.norm(dim=1), W_dec.norm(dim=1)),
        gain_kept=_ratios((W_enc * kept).sum(dim=1), (W_enc * W_dec).sum(dim=1)),
    )


def gain_matrix(
    sae: SAE, latents: Sequence[int], protected: Sequence[LatentOf] = ()
) -> Tensor | None:
    """G of these latents, as above: ``[n, n]`` float64.

    Args:
        sae: any SAE.
        latents: any of its latents.
        protected: as in `solve`.

    Returns:
        None if the SAE reads another width than it writes.
    """
    W_enc, W_dec = _folded(sae, latents)
    if W_enc.shape[1] != W_dec.shape[1]:
        return None
    return W_enc @ _orthogonal(W_dec, protected).T


def written_rows(sae: SAE, latents: Sequence[int], protected: Sequence[LatentOf] = ()) -> Tensor:
    """What one unit of each latent adds at the first place of writing: ``[n, d_out]`` float64.

    The decoder's scale is folded in, and the rows are made orthogonal to what is ``protected``.
    """
    _, W_dec = _folded(sae, latents)
    return _orthogonal(W_dec, protected)


def _folded(sae: SAE, latents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Encoder rows [n, d_in] and decoder rows [n, d_out], each times its gain; float64."""
    rows = sae.rows(latents)
    return (
        rows.W_enc.double() * rows.gain.double()[:, None],
        rows.W_dec.double() * rows.decoder_scale.double()[:, None],
    )


def _orthogonal(W_dec: Tensor, protected: Sequence[LatentOf]) -> Tensor:
    """The part of each row that is orthogonal to the protected encoder rows."""
    if not protected:
        return W_dec
    W_enc = torch.cat([sae.rows([latent]).W_enc for sae, latent in protected]).double()
    # Rows that are nearly the same span fewer directions than there are rows. The singular values
    # tell which are real and which are made of rounding errors.
    _, sizes, basis = torch.linalg.svd(W_enc, full_matrices=False)
    basis = basis[sizes > sizes.max() * torch.finfo(torch.float32).eps]
    # Twice: the second time takes out what rounding left of the first.
    for _ in range(2):
        W_dec = W_dec - (W_dec @ basis.T) @ basis
    return W_dec


def _ratios(new: Tensor, old: Tensor) -> list[float | None]:
    pairs = zip(new.tolist(), old.tolist(), strict=True)
    return [None if before == 0 else after / before for after, before in pairs]


def _reread_rows(name: str, latents: Sequence[int], W_enc: Tensor, W_dec: Tensor) -> Tensor:
    G = W_enc @ W_dec.T
    least = int(G.diagonal().argmin())
    gain = float(G[least, least])
    if not gain >= LEAST_GAIN:
        raise IllConditionedError(
            f"feature {latents[least]} of SAE {name!r}: a unit of it, read again, moves it by only "
            f"{gain:.3g}, and 'reread' needs at least {LEAST_GAIN:g}"
        )
    condition = float(torch.linalg.cond(G))
    if not condition <= MOST_CONDITION:
        raise IllConditionedError(
            f"features {', '.join(map(str, sorted(latents)))} of SAE {name!r}: the matrix of their "
            f"gains has condition number {condition:.3g}, and 'reread' needs at most "
            f"{MOST_CONDITION:g}; leave out one of the features that mean nearly the same"
        )
    solved: Tensor = torch.linalg.solve(G.T, W_dec)  # inverse(G).T @ W_dec
    return solved
