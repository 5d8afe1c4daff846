"""Whether an SAE fits the stream it is put on: how it reconstructs a few hundred real tokens.

    L0 = mean over tokens of |{i : f_i != 0}|
    variance explained = 1 - FVU,  FVU = sum |x - decode(f)|^2 / sum |x - mean(x)|^2

over the tokens of `TEXT` without the first one, special tokens and attention sinks, whose norm is a
hundred times that of others and would be all there is to explain.

The bounds come from the demo SAE (d_sae 4608, trained at layer 14 of SmolLM2-135M-Instruct; its
card says L0 32.4 and 0.82) on `TEXT`, 437 tokens counted, in float32:

    ====================================================  =========  ==================
    what it is put on                                            L0  variance explained
    ====================================================  =========  ==================
    layer 14, as trained (hundred tokens at a time)        33 (27-39)  0.81 (0.79-0.80)
    layer 13, 15                                             28, 38          0.76, 0.73
    layers 10 to 12, 16 to 18                        20-24, 40-54  0.63-0.72, 0.61-0.66
    layers 4 to 9, 19                                     18-21, 97     0.32-0.59, 0.48
    layers 2 and 3, 20                                  15, 17, 147    0.22, 0.28, 0.27
    layers 0 and 1, 21 to 29                      11-12, 229-1923  -2.0, -0.5, -0.2 to -46
    hook_mlp_out or hook_attn_out, any layer               12-1279      -0.7 and below
    layer 14, its threshold left out (standard)                508                 0.56
    layer 14, b_dec not subtracted from the input              291                 -5.1
    layer 14, its input 10 times too small, too large     11, 1280         -35.5, -10.3
    layer 14, layer_norm applied to the input                    9                -13.9
    layer 14, decoder rows in another order                     33                -0.45
    ====================================================  =========  ==================

So another hook, or a wrong architecture or scale, shows at once. A layer four or more away shows if
the SAE's files state the variance that it explains. A neighbouring layer does not show: the stream
changes little from one to the next. Nor need a base model's SAE on the instruct model show in these
numbers (there was no such pair to measure); so the models' names are compared if the SAE's files
state one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sae.arrays import FloatArray, IntArray
from sae.card import KINDS_THAT_DECODE, SAECard
from sae.formats import open_layout
from sae.numbers import finite
from sae.source import ResolvedSAE

#: Prose, dialogue, numbers, code and another language, written for this check.
TEXT: Final = """\
The ferry left the harbour a little after six, when the lamps along the quay were still lit. \
Nobody stood on deck except an old surveyor, who had crossed the strait every week for thirty \
years and no longer looked at the islands. He was reading a letter from his daughter. She had \
moved to a city in the south to study chemistry, and she wrote that the winters there smelled of \
oranges and coal.

"Are you going as far as Northwick?" asked the boy who sold coffee.
"Further," said the surveyor. "And you? Shouldn't you be at school?"
"It's a holiday. Besides, I like the engines. Do you know how fast we're going?"
"About fourteen knots. Ask me again when we've passed the lighthouse."

In 1911 the lighthouse was rebuilt in granite, 42 metres high; its lamp can be seen from a \
distance of 18 miles. Light takes less than a ten-thousandth of a second to cover that distance, \
because it travels at roughly 300,000 kilometres per second.

def mean_depth(soundings: list[float], skip: int = 0) -> float:
    \"\"\"Average depth in metres, without the first few readings.\"\"\"
    kept = soundings[skip:]
    if not kept:
        raise ValueError("no soundings left")
    return sum(kept) / len(kept)

for name, depths in sorted(stations.items()):
    print(f"{name}: {mean_depth(depths, skip=2):.1f} m")

Le bateau arriva au port vers midi. Il pleuvait, et la petite place devant l'église était presque \
vide. Une femme vendait des pommes sous un parapluie rouge ; elle demanda au vieil homme s'il \
avait fait bon voyage, mais il ne répondit pas tout de suite.
"""

#: A token whose norm is more than this many times the median is an attention sink.
SINK_FACTOR: Final = 10.0
#: An L0 that is more than the stated one times this, or less than it divided by this, is wrong.
L0_FACTOR: Final = 2.0
#: In no sparse autoencoder does a larger part of the features than this fire on each token.
DENSE: Final = 0.1
#: A variance explained that is more than this below the stated one is wrong.
VARIANCE_MARGIN: Final = 0.15
#: The least variance explained that is right if no value is stated.
VARIANCE_FLOOR: Final = 0.3
#: On fewer tokens than this the values are not judged.
ENOUGH_TOKENS: Final = 64

_L0_IN_FOLDER = re.compile(r"average_l0_(\d+)")
_GEMMA_SCOPE = re.compile(r"gemma-scope-((?:2b|9b|27b)-(?:pt|it))(?![a-z])")
#: Keys of configurations, the most telling first; the sparsity that training aimed at stands in for
#: L0.
_L0_KEYS = ("l0", "target_l0", "top_k", "k")
_VARIANCE_KEYS = ("variance_explained", "explained_variance", "frac_variance_explained")
_MODEL_KEYS = ("model_name", "lm_name")
#: A model's name is printed and logged, and whoever wrote the file may be a stranger.
_MODEL_NAME = re.compile(r"[\w./:@+ -]{1,200}")
#: Parts of models' names that say how they were trained, not which they are. A name without any is
#: a base model's (gemma-2-2b) or, beside one that ends in -Base, an instruct model's (Qwen3-8B).
_INSTRUCT = frozenset({"it", "instruct", "chat"})
_BASE = frozenset({"base"})
_PRETRAINED = frozenset({"pt"})


@dataclass(frozen=True)
class Stated:
    """What an SAE's files, its folder or SAELens' registry say of it; None for what they do not."""

    l0: float | None = None
    variance_explained: float | None = None
    model: str | None = None


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        tokens: how many tokens count.
        sinks: how many were left out for their norm.
        l0: mean number of active features; NaN if no token counts.
        variance_explained: at most 1; NaN if the stream does not vary or is not finite.
        median_norm: of the stream at the tokens that count; None if there is none.
    """

    tokens: int
    sinks: int
    l0: float
    variance_explained: float
    median_norm: float | None = None


class Observed:
    """Tokens of the text as they pass the hook point, by position: a recomputed one counts once."""

    def __init__(self) -> None:
        self._tokens: dict[int, tuple[FloatArray, float, int]] = {}

    @property
    def nbytes(self) -> int:
        """Host memory held, roughly."""
        return sum(x.nbytes + 64 for x, _, _ in self._tokens.values())

    def put(self, positions: IntArray, x: FloatArray, x_hat: FloatArray, l0: IntArray) -> None:
        """Add tokens.

        Args:
            positions: ``[n]``.
            x: ``[n, d_in]`` the stream.
            x_hat: ``[n, d_in]`` its reconstruction.
            l0: ``[n]`` how many features fire.
        """
        error = np.square(x.astype(np.float64) - x_hat).sum(axis=1)
        for i, position in enumerate(positions.tolist()):
            self._tokens[position] = (x[i].copy(), float(error[i]), int(l0[i]))

    def measured(self, limit: int) -> Measured:
        """What was found at the positions below ``limit``, without sinks."""
        tokens = [token for position, token in self._tokens.items() if position < limit]
        if not tokens:
            return Measured(0, 0, math.nan, math.nan)
        x = np.stack([x for x, _, _ in tokens]).astype(np.float64)  # [n, d_in]
        error, l0 = (np.array([token[i] for token in tokens]) for i in (1, 2))
        norm = np.linalg.norm(x, axis=1)
        kept = ~(norm > SINK_FACTOR * np.median(norm))
        total = float(np.square(x[kept] - x[kept].mean(axis=0)).sum())
        return Measured(
            tokens=int(kept.sum()),
            sinks=int((~kept).sum()),
            l0=float(l0[kept].mean()),
            variance_explained=1 - float(error[kept].sum()) / total if total > 0 else math.nan,
            median_norm=float(np.median(norm[kept])),
        )


@dataclass(frozen=True)
class Outcome:
    """A finished check of one SAE on one model."""

    card: SAECard
    measured: Measured
    stated: Stated
    model: str

    @property
    def judged(self) -> bool:
        """Whether there were tokens enough to say something of the values."""
        return self.measured.tokens >= ENOUGH_TOKENS

    @property
    def complaints(self) -> list[str]:
        """What is off, and what that likely means; empty if nothing is."""
        if self.judged and not math.isfinite(self.measured.variance_explained):
            return ["the stream or its reconstruction does not vary or is not finite"]
        found = self._facts() if self.judged else []
        if found:
            found.append(self._likely())
        if self.stated.model is not None and is_other_training(self.stated.model, self.model):
            found.append(
                f"it was trained on {self.stated.model} and this is {self.model}: one is the base "
                "model, the other its instruct version"
            )
        return found

    @property
    def remarks(self) -> list[str]:
        """The complaints, after a word about too few tokens if there were too few to judge by."""
        few = [] if self.judged else [f"fewer than {ENOUGH_TOKENS} tokens are too few to judge by"]
        return few + self.complaints

    def line(self) -> str:
        """The measured and the stated values, and the remarks, in one line."""
        measured, stated = self.measured, self.stated
        sinks = f" (sinks left out: {measured.sinks})" if measured.sinks else ""
        values = (
            f"SAE {self.card.id!r} at {self.card.hook}: L0 {measured.l0:.1f}"
            f"{_beside(stated.l0, 'g')}, variance explained {measured.variance_explained:.2f}"
            f"{_beside(stated.variance_explained, '.2f')} on {measured.tokens} tokens{sinks}"
        )
        return "; ".join([values, *self.remarks])

    @property
    def _l0_ratio(self) -> float | None:
        return None if self.stated.l0 is None else self.measured.l0 / self.stated.l0

    @property
    def _dense(self) -> bool:
        """Whether too many features fire. A top-k SAE cannot be denser than it was made."""
        ratio = self._l0_ratio
        as_stated = ratio is not None and ratio <= L0_FACTOR
        dense = self.measured.l0 > DENSE * self.card.d_sae
        return dense and not as_stated and self.card.exact_from_row

    def _facts(self) -> list[str]:
        l0, variance = self.measured.l0, self.measured.variance_explained
        found = []
        ratio = self._l0_ratio
        if ratio is not None and not 1 / L0_FACTOR <= ratio <= L0_FACTOR:
            found.append(f"L0 is {ratio:.2g} times what is stated")
        if self._dense:
            found.append(f"{l0 / self.card.d_sae:.0%} of all features fire on each token")
        stated = self.stated.variance_explained
        if variance < 0 and (stated is None or stated > 0):
            found.append("the mean of the stream would reconstruct it better")
        elif stated is not None and variance < stated - VARIANCE_MARGIN:
            found.append(f"variance explained is {stated - variance:.2f} below what is stated")
        elif stated is None and variance < VARIANCE_FLOOR:
            found.append("variance explained is low")
        return found

    def _likely(self) -> str:
        if self._dense and self.measured.variance_explained >= 0:
            return (
                f"likely not the architecture ({self.card.architecture}) that it was trained as: "
                "a threshold or a top k is left out"
            )
        place = "likely the wrong layer, hook or model (base for instruct, say)"
        if self.measured.variance_explained >= 0:
            return place
        return f"{place}, or the wrong architecture or input scale"


def reconstructs(card: SAECard) -> bool:
    """Whether there is something to check: an output of its own to hold against the model's."""
    return card.kind in KINDS_THAT_DECODE


def stated_by(ref: ResolvedSAE, *, exactly_k: bool) -> Stated:
    """What is stated of a resolved source; reads its configurations and headers.

    Args:
        ref: the source.
        exactly_k: whether it is a top-k SAE. Its L0 is k by construction, so k is not taken.

    Raises:
        SAEError: as opening the SAE does.
    """
    files, _ = open_layout(ref)
    sections = [
        section
        for config in files.configs.values()
        for section in (config.get("metadata"), config.values, config.get("trainer"))
        if isinstance(section, dict)
    ]
    facts = ref.facts
    aims = _L0_KEYS[:1] if exactly_k else _L0_KEYS
    l0 = [*_numbers(sections, aims[:1])]
    if found := files.search(ref, _L0_IN_FOLDER):
        l0.append(float(found))
    if facts.l0 is not None:
        l0.append(facts.l0)
    l0 += _numbers(sections, aims[1:])
    variance = [1 - fvu for fvu in _numbers(sections, ("fvu",))]
    variance += _numbers(sections, _VARIANCE_KEYS)
    if facts.variance_explained is not None:
        variance.append(facts.variance_explained)
    names = [s[key] for key in _MODEL_KEYS for s in sections if isinstance(s.get(key), str)]
    models = [name for name in names if _MODEL_NAME.fullmatch(name)]
    # The registry calls the model of Gemma Scope's -it SAEs by its base's name.
    if (size := files.search(ref, _GEMMA_SCOPE)) is not None:
        models.append(f"gemma-2-{size.removesuffix('-pt')}")
    if facts.model is not None:
        models.append(facts.model)
    return Stated(
        l0=next((value for value in l0 if value > 0), None),
        variance_explained=next((value for value in variance if value <= 1), None),
        model=next(iter(models), None),
    )


def is_other_training(trained_on: str, served: str) -> bool:
    """Whether one name is a base model's and the other that of its instruct version.

    False for the names of different models. Either may say more (a version, a quantization) at its
    end.
    """
    family, training = _family_and_training(trained_on)
    served_family, served_training = _family_and_training(served)
    known = min(len(family), len(served_family))
    return family[:known] == served_family[:known] and training != served_training


def _family_and_training(model: str) -> tuple[list[str], str]:
    parts = re.split(r"[-_]", model.rstrip("/").rpartition("/")[2].lower())
    markers = {*parts} & (_INSTRUCT | _BASE)
    training = "" if not markers else "instruct" if markers & _INSTRUCT else "base"
    return [p for p in parts if p not in _INSTRUCT | _BASE | _PRETRAINED], training


def _numbers(sections: list[dict[str, Any]], keys: tuple[str, ...]) -> Iterator[float]:
    for key in keys:
        for section in sections:
            if (value := finite(section.get(key))) is not None:
                yield value


def _beside(stated: float | None, form: str) -> str:
    return "" if stated is None else f" (stated {stated:{form}})"
