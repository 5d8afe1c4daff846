"""What a study wants to know of a text's features, beside what a client may ask for.

No client's field holds any of this: studies put it beside what was accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steering.request.positions import Positions

#: How a latent's activations over a text become one number.
Pooling = Literal["mean", "max", "last"]

#: Which tokens take part: those that one of these covers.
Tokens = tuple[Positions, ...]

EVERY_TOKEN: Tokens = (Positions(),)
PROMPT_TOKENS: Tokens = (Positions(generation=False),)
COMPLETION_TOKENS: Tokens = (Positions(prompt=False),)


@dataclass(frozen=True)
class Pool:
    """Every latent's activations, summed up over a text.

    Attributes:
        sae: name of the SAE.
        tokens: the tokens that take part; sinks do not.
        pool: what `steering.studies.reading.Pooled.pooled` is.
        scaled: an activation is summed times the SAE's own output scale at its token.
        peaks: each token's largest activation of any latent as well.
    """

    sae: str
    tokens: Tokens
    pool: Pooling = "mean"
    scaled: bool = False
    peaks: bool = False


@dataclass(frozen=True)
class KeepStream:
    """Keep the stream where an SAE reads it, behind all edits that are made there, until it is
    compared with another run's.

    Attributes:
        sae: name of the SAE.
        tokens: which tokens; of an unsteered run at least those that are compared.
        key: what it is kept under, of this run alone.
    """

    sae: str
    tokens: Tokens
    key: str


Probe = Pool | KeepStream
