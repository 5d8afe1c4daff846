"""What a study wants to know about a text's features, besides what a client may ask for.

No ``steering`` field can hold any of this: studies add it to what was accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steering.request.positions import Positions

#: How a latent's activations over a text become one number.
Pooling = Literal["mean", "max", "last"]

#: The tokens that take part: those that at least one of these covers.
Tokens = tuple[Positions, ...]

EVERY_TOKEN: Tokens = (Positions(),)
PROMPT_TOKENS: Tokens = (Positions(generation=False),)
COMPLETION_TOKENS: Tokens = (Positions(prompt=False),)


@dataclass(frozen=True)
class Pool:
    """Every latent's activations, summed up over a text.

    Attributes:
        sae: name of the SAE.
        tokens: the tokens that take part; sinks never do.
        pool: how a text's activations become `steering.studies.reading.Pooled.pooled`.
        scaled: whether each activation is multiplied by the SAE's own output scale at its token
            before it is summed.
        peaks: whether each token's largest activation of any latent is recorded as well.
    """

    sae: str
    tokens: Tokens
    pool: Pooling = "mean"
    scaled: bool = False
    peaks: bool = False


@dataclass(frozen=True)
class KeepStream:
    """Keep the stream where an SAE reads it until it is compared with another run's.

    It is kept as it is after all edits that are made there.

    Attributes:
        sae: name of the SAE.
        tokens: the tokens whose stream is kept; in an unsteered run at least those that are
            compared.
        key: the name under which it is kept, which no other run has.
    """

    sae: str
    tokens: Tokens
    key: str


Probe = Pool | KeepStream
