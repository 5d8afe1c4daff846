"""A direction's dose: from English to French by the difference of two means.

``python -m tests.bench.direction [out.json]``

`sae.training.direction` makes a control vector of ``french.txt`` less ``english.txt``, the same 16
sentences in both languages, and ``vllm-sae serve`` serves it. `add` of a multiple of `max_act`,
which is that multiple of the vector, at every token of the prompts `REPORT` and of their answers;
layer by layer, `LAYERS`. Sentences, layers, doses, prompts and measure were fixed before anything
was generated.

An answer is French if at least `FRENCH_SHARE` of its words are among `FRENCH_WORDS`, words that
French cannot do without and that English, Spanish, Italian and Portuguese do not share. "repeated"
is the share of an answer's word trigrams that occurred before in it. Answers are greedy with a
repetition penalty, as the demo's.

Two figures of KL, of every third of the passages that ship with the project. "own kl" is
`evaluate`'s of what each dose itself writes after a passage, 64 tokens. "kl" is of the passages as
they are: `calibrate` says what dose costs 0.1 and 0.5 there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any, Final

from server.commands.demo_model import ensure_demo_model
from steering.studies.neutral import neutral_passages
from tests.bench.chat_answers import (
    REPETITION_PENALTY,
    answers,
    repeated,
    served,
    study,
)
from tests.bench.record import Record, arguments
from tests.bench.steering_prompts import REPORT
from tests.engine.server import LiveServer

LAYERS: Final = (14, 8, 20)
DOSES: Final = (0.5, 1.0, 1.5, 2.0, 3.0)
BUDGETS: Final = (0.1, 0.5)
MAX_TOKENS: Final = 40
PASSAGES_STEP: Final = 3
FRENCH_SHARE: Final = 0.1
FRENCH_WORDS: Final = frozenset(
    (
        *("les", "une", "des", "du", "et", "est", "dans", "qui", "pas", "avec", "sur", "au", "aux"),
        *("ce", "cette", "il", "elle", "nous", "vous", "je", "ne", "sont", "mais", "ou", "où"),
        *("très", "leur", "ses", "mes", "notre", "votre", "être", "avoir", "fait", "comme", "tout"),
        *("pour", "par", "à", "l", "qu", "j", "n"),
    )
)


def french_share(text: str) -> float:
    """Share of the words of a text that are among `FRENCH_WORDS`."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return sum(word in FRENCH_WORDS for word in words) / len(words) if words else 0.0


def added(layer: int, dose: float) -> dict[str, Any]:
    """So many times the vector, wherever a request steers."""
    edit = {"sae": f"french.{layer}", "feature": 0, "op": "add", "value": dose, "unit": "max_act"}
    return {"interventions": [edit]}


def figures(texts: list[str]) -> dict[str, float]:
    """Of the answers at one dose."""
    shares = [french_share(text) for text in texts]
    return {
        "french": mean(share >= FRENCH_SHARE for share in shares),
        "french_words": mean(shares),
        "repeated": mean(map(repeated, texts)),
    }


def neutral() -> list[dict[str, str]]:
    """What KL is measured on."""
    return [{"prompt": passage} for passage in neutral_passages()[::PASSAGES_STEP]]


def doses(server: LiveServer, layer: int, record: Record) -> list[dict[str, Any]]:
    """The curve of one layer, and its answers."""
    configurations = [{"name": f"{d:g}", "steering": added(layer, d)} for d in DOSES]
    evaluated = study(
        server,
        "/v1/steering/evaluate",
        {"texts": neutral(), "configurations": configurations, "features": []},
    )["configurations"]
    rows = []
    for dose, of_dose in zip(DOSES, evaluated, strict=True):
        found = answers(server, REPORT, added(layer, dose), MAX_TOKENS)
        record.add(layer=layer, dose=dose, **figures(found), own_kl=of_dose["kl"]["mean"])
        rows.append({"layer": layer, "dose": dose, "answers": found})
    return rows


def calibrated(server: LiveServer, layer: int, record: Record) -> None:
    """The doses at which the vector costs so much, and what they do."""
    for budget in BUDGETS:
        body = {"steering": added(layer, 1.0), "budget": {"value": budget}, "texts": neutral()}
        found = study(server, "/v1/steering/calibrate", body)
        texts = answers(server, REPORT, found["steering"], MAX_TOKENS)
        record.add(
            layer=layer, dose=found["multiplier"], **figures(texts), kl=found["achieved"],
            calibrated_to=budget,
        )  # fmt: skip


def control_vector(folder: Path) -> Path:
    """The GGUF file, made by the project's own command."""
    here, output = Path(__file__).parent, folder / "french.gguf"
    command = [
        *(sys.executable, "-m", "sae.training.direction", "--model", str(ensure_demo_model())),
        *("--positive", str(here / "french.txt"), "--negative", str(here / "english.txt")),
        *("--output", str(output), "--layers", *map(str, LAYERS)),
    ]
    subprocess.run(command, check=True)
    return output


def main() -> None:
    """Make the vector, serve it and write the JSON."""
    args = arguments(__doc__).parse_args()
    record = Record(
        "direction",
        "English to French by the difference of two means: answers to 12 prompts at each dose.",
        {
            "prompts": len(REPORT),
            "max_tokens": MAX_TOKENS,
            "repetition_penalty": REPETITION_PENALTY,
            "passages": len(neutral()),
            "french_share": FRENCH_SHARE,
        },
    )
    rows: list[dict[str, Any]] = record.kept.setdefault("rows", [])
    with (
        tempfile.TemporaryDirectory() as folder,
        served(f"french={control_vector(Path(folder))},layer=all") as server,
    ):
        unsteered = answers(server, REPORT, None, MAX_TOKENS)
        record.add(layer="", dose=0.0, **figures(unsteered), own_kl=0.0)
        rows.append({"layer": None, "dose": 0.0, "answers": unsteered})
        for layer in LAYERS:
            rows += doses(server, layer, record)
            calibrated(server, layer, record)
            record.save(args.json)


if __name__ == "__main__":
    main()
