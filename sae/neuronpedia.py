"""Import of Neuronpedia's exports into `features.jsonl`.

An export of one source holds `{features,explanations,activations}/batch-N.jsonl.gz`; any of the
three may be missing. Neuronpedia folds the norm of the decoder row into the encoder before it
measures, so its activations are f_i * |W_dec_i|; they are converted to the unit of the SAE's card.

Each row names its model (`modelId`) and its source (`layer`: `15-gemmascope-res-16k`, a layer and
what is read there). An export of another model, layer, site or size is refused: its features are
others, though their indices are the same.
"""

from __future__ import annotations

import gzip
import heapq
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae import json_lines
from sae.card import KIND_CLT, KIND_TRANSCODER, UNIT_TIMES_DECODER_NORM, SAECard
from sae.errors import SAEError
from sae.json_lines import number_of
from sae.numbers import finite

KINDS = ("features", "explanations", "activations")
NUM_EXAMPLES = 10
#: How many features a batch holds.
BATCH = 1024
# What is shown of an example around its strongest token.
TOKENS_BEFORE = 24
TOKENS_AFTER = 8

# How Neuronpedia writes a space of SentencePiece, and a line break.
_SPELLING = str.maketrans({"\u2581": " ", "\u21b5": "\n"})


_GO_ON = "to import it all the same, add --force"
# A source's name begins with its layer, and words in it say what is read; a transcoder is no SAE of
# either of its places.
_SOURCE = re.compile(r"(?P<layer>\d{1,4})(?![\d.])", re.ASCII)
_SITES = {
    "res": "resid",
    "resid": "resid",
    "mlp": "mlp",
    "att": "attn",
    "attn": "attn",
    "transcoder": "transcoder",
    "clt": "transcoder",
}


@dataclass
class _Known:
    """What the export says of one feature; examples as a heap with the weakest on top."""

    label: str | None = None
    max_activation: float | None = None
    density: float | None = None
    examples: list[tuple[float, str]] = field(default_factory=list)

    def to_json(self, index: int) -> dict[str, Any]:
        examples = sorted(self.examples, key=lambda example: -example[0])
        return {
            "index": index,
            "label": self.label,
            "max_activation": self.max_activation,
            "density": self.density,
            "examples": [{"text": text, "activation": value} for value, text in examples],
        }


@dataclass(frozen=True)
class ImportSummary:
    """How many features the written file knows, and of how many it has a label or a maximum."""

    features: int
    labels: int
    max_activations: int


def import_neuronpedia(
    export: Path | Sequence[Path],
    out: Path,
    card: SAECard,
    decoder_norms: Sequence[float],
    *,
    model: str | None = None,
    force: bool = False,
) -> ImportSummary:
    """Write `features.jsonl` from an export; an existing file is replaced once all is read.

    Args:
        export: the folder of one source, or several parts of it: folders and `KIND/batch-N` files.
        out: the file to write.
        card: the SAE's.
        decoder_norms: |W_dec_i| of every latent, [d_sae]; if the card's activations are plain, the
            export's are divided by them.
        model: what the SAE was trained on, None if that is not known.
        force: take an export of another SAE all the same, and leave out what lies past d_sae.

    Raises:
        SAEError: if a part is no export, a file is damaged, or it is of another SAE.
    """
    reader = _Reader(card, model, force)
    if len(decoder_norms) != card.d_sae:
        raise SAEError(f"{len(decoder_norms)} decoder norms for d_sae {card.d_sae}")
    batches: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    parts = (export,) if isinstance(export, Path) else export
    for part in parts:
        for kind, paths in _batches_of(part).items():
            batches[kind] += paths
    folded = card.activation_unit == UNIT_TIMES_DECODER_NORM
    units = [1.0] * card.d_sae if folded else decoder_norms
    known: dict[int, _Known] = {}
    for path in batches["features"]:
        for where, index, values in reader.rows(path):
            feature = known.setdefault(index, _Known())
            feature.max_activation = _in_unit(
                number_of(where, values, "maxActApprox"), units[index]
            )
            feature.density = number_of(where, values, "frac_nonzero")
    for path in batches["explanations"]:
        for where, index, values in reader.rows(path):
            feature = known.setdefault(index, _Known())
            # Several explainers may have described it: the first stands.
            feature.label = feature.label or _text(where, values, "description")
    for path in batches["activations"]:
        for where, index, values in reader.rows(path):
            _add_example(known.setdefault(index, _Known()), where, values, units[index])
    if any(part.is_dir() for part in parts):
        reader.refuse_smaller(known)
    _write(out, known)
    return ImportSummary(
        features=len(known),
        labels=sum(feature.label is not None for feature in known.values()),
        max_activations=sum(feature.max_activation is not None for feature in known.values()),
    )


def _batches_of(part: Path) -> dict[str, list[Path]]:
    """The batches of each kind in a folder of an export; a file is the only batch of its kind."""
    if part.is_file() and part.absolute().parent.name in KINDS:
        return {part.absolute().parent.name: [part]}
    found = {kind: paths for kind in KINDS if (paths := _batches(part / kind))}
    if not found:
        raise SAEError(
            f"{part}: not a Neuronpedia export, expected a folder with batch-N.jsonl.gz in its "
            "features/, explanations/ or activations/, or such a file in a folder of that name"
        )
    return found


def _batches(folder: Path) -> list[Path]:
    """`batch-N.jsonl.gz` in the order of N."""
    numbered = [
        (int(match.group(1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"batch-(\d+)\.jsonl\.gz", path.name))
    ]
    return [path for _, path in sorted(numbered)]


class _Reader:
    """Reads the rows of an export, and holds what they say of its SAE against the card."""

    def __init__(self, card: SAECard, model: str | None, force: bool) -> None:
        self._card = card
        self._model = model
        self._force = force

    def rows(self, path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """(file and line, feature, object) of each line of a compressed file."""
        number = 0
        try:
            with gzip.open(path, "rb") as file:
                for number, _, line in json_lines.lines(file, path):
                    where = json_lines.place(path, number)
                    values = json_lines.parsed(where, line)
                    index = self._feature(where, values)
                    self._refuse_another(where, values)
                    if index < self._card.d_sae:
                        yield where, index, values
        except (OSError, EOFError, zlib.error) as error:
            raise SAEError(f"{path}: truncated or damaged after line {number}: {error}") from error

    def refuse_smaller(self, known: Iterable[int]) -> None:
        """Refuse an export that describes all features up to some index and none of the others."""
        indices = set(known)
        complete = len(indices) == max(indices, default=-1) + 1
        if complete and BATCH <= len(indices) < self._card.d_sae and not self._force:
            raise SAEError(
                f"the export describes features 0 to {len(indices) - 1}, but the SAE has "
                f"{self._card.d_sae}: it is for an SAE of another size, or is only a part; {_GO_ON}"
            )

    def _feature(self, where: str, values: dict[str, Any]) -> int:
        index, d_sae = values.get("index"), self._card.d_sae
        text = str(index) if isinstance(index, int | str) and not isinstance(index, bool) else ""
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
            raise SAEError(f"{where}: index {index!r:.40} not in [0, {d_sae}): not of this SAE")
        if int(text) >= d_sae and not self._force:
            raise SAEError(
                f"{where}: index {index!r:.40} not in [0, {d_sae}): not of this SAE; {_GO_ON}"
            )
        return int(text)

    def _refuse_another(self, where: str, values: dict[str, Any]) -> None:
        if self._force:
            return
        model, source = values.get("modelId"), values.get("layer")
        if isinstance(model, str) and self._model is not None and not same(model, self._model):
            raise SAEError(
                f"{where}: the export is of the model {model!r:.60}, the SAE of "
                f"{self._model!r:.100}; {_GO_ON}"
            )
        found = _SOURCE.match(str(source)) if isinstance(source, int | str) else None
        if found is None:
            return
        if int(found["layer"]) != self._card.layer:
            raise SAEError(
                f"{where}: the export is of layer {found['layer']} ({source!r:.60}), the SAE is at "
                f"{self._card.hook}; {_GO_ON}"
            )
        sites = {
            _SITES[word] for word in re.split(r"[^a-z]+", str(source).lower()) if word in _SITES
        }
        if sites and _site(self._card) not in sites:
            raise SAEError(
                f"{where}: the export is of {source!r:.60}, the SAE is at {self._card.hook}; "
                f"{_GO_ON}"
            )


def same(exported: str, model: str) -> bool:
    """Whether Neuronpedia's name and Hugging Face's or TransformerLens' mean the same model."""
    return _plain_name(exported) == _plain_name(model)


def _plain_name(model: str) -> str:
    name = model.rstrip("/").rpartition("/")[2].lower().replace("_", "-")
    name = re.sub(r"-(?:instruct|chat)(?=-|$)", "-it", name)
    name = re.sub(r"-(?:pt|hf)(?=-|$)|-v\d+(?:\.\d+)*$", "", name)
    name = re.sub(r"[^a-z0-9]", "", name).removeprefix("meta")
    return "gpt2" if name == "gpt2small" else name


def _site(card: SAECard) -> str:
    if card.kind in (KIND_TRANSCODER, KIND_CLT):
        return "transcoder"
    kind = card.hook.split(".", 2)[2]
    return next(site for site in ("resid", "mlp", "attn") if site in kind)


def _text(where: str, values: dict[str, Any], key: str) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise SAEError(f"{where}: {key} must be a string, got {value!r:.40}")
    return (value or "").strip() or None


def _in_unit(value: float | None, unit: float) -> float | None:
    # A latent that writes nothing was never active in the export's unit.
    return None if value is None or unit == 0 else value / unit


def _add_example(feature: _Known, where: str, values: dict[str, Any], unit: float) -> None:
    tokens, strengths = values.get("tokens"), values.get("values")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise SAEError(f"{where}: tokens must be a list of strings")
    if not isinstance(strengths, list) or len(strengths) != len(tokens) or not tokens:
        raise SAEError(f"{where}: values must be a list of as many numbers as tokens")
    if any(finite(value) is None for value in strengths):
        raise SAEError(f"{where}: values must be finite numbers")
    peak = max(range(len(tokens)), key=strengths.__getitem__)
    activation = _in_unit(float(strengths[peak]), unit)
    if activation is None or activation <= 0:
        return
    window = tokens[max(0, peak - TOKENS_BEFORE) : peak + 1 + TOKENS_AFTER]
    example = (activation, "".join(window).translate(_SPELLING).strip())
    if example in feature.examples:
        return
    if len(feature.examples) < NUM_EXAMPLES:
        heapq.heappush(feature.examples, example)
    else:
        heapq.heappushpop(feature.examples, example)


def _write(out: Path, known: dict[int, _Known]) -> None:
    unfinished = out.with_name(f"{out.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for index in sorted(known):
            file.write(json.dumps(known[index].to_json(index), ensure_ascii=False) + "\n")
    os.replace(unfinished, out)
