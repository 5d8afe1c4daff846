"""Features of the small transcoder and the SAE of heads, found by contrast and steered with.

``python -m tests.bench.dictionary_features [out.json] [--dictionaries transcoder heads]``

``vllm-sae serve`` with the two dictionaries of ``tests/data``. For each topic of
``feature_topics.py``, `contrast` of its texts against those of all other topics proposes
a feature of each dictionary. It is clamped to `STRENGTHS` times its recorded maximum on the
first prompts of `SELECTION`. A feature works if at least half of the answers are on topic, at most
a quarter of the unsteered ones, and at most a fifth of the word trigrams are repeated; the one with
most answers on topic, at the lowest strength of equals, is reported on the prompts `REPORT`. Where
none works the one with most answers on topic is reported all the same. Topics, tests, prompts and
strengths were fixed before anything was generated. Answers are greedy with a repetition penalty,
as the demo's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Final

from tests.bench.chat_answers import REPETITION_PENALTY, answers, repeated, served, study
from tests.bench.feature_topics import TOPICS, Topic
from tests.bench.record import RESULTS, Record, arguments
from tests.bench.steering_prompts import REPORT
from tests.bench.steering_prompts import SELECTION as PROMPTS
from tests.engine.server import LiveServer
from tests.small_dictionaries import SMALL_DICTIONARIES

SELECTION: Final = PROMPTS[:4]
CANDIDATES: Final = 1
STRENGTHS: Final = (3.0, 8.0)
MAX_TOKENS: Final = 40
LEAST_ON_TOPIC: Final = 0.5
MOST_UNSTEERED: Final = 0.25
MOST_REPEATED: Final = 0.2


@dataclass(frozen=True)
class Tried:
    """A feature at one strength on some prompts."""

    topic: Topic
    feature: int
    strength: float
    texts: list[str]

    @property
    def on_topic(self) -> float:
        """Share of the answers."""
        return mean(map(self.topic.shown_in, self.texts))

    @property
    def repeated(self) -> float:
        """Mean share of repeated word trigrams."""
        return mean(map(repeated, self.texts))

    def works(self, unsteered: Sequence[str]) -> bool:
        """Whether it makes the model speak of its topic in words that hold together."""
        return (
            self.on_topic >= LEAST_ON_TOPIC
            and mean(map(self.topic.shown_in, unsteered)) <= MOST_UNSTEERED
            and self.repeated <= MOST_REPEATED
        )


def clamped(sae: str, feature: int, strength: float) -> dict[str, Any]:
    """A feature at so many times its recorded maximum."""
    edit = {"sae": sae, "feature": feature, "op": "clamp", "value": strength, "unit": "max_act"}
    return {"interventions": [edit]}


def candidates(server: LiveServer, sae: str, topic: Topic) -> list[int]:
    """Features that tell the topic's texts from those of the others, best first."""
    others = [text for other in TOPICS if other is not topic for text in other.texts]
    body = {
        "positive": [{"prompt": text} for text in topic.texts],
        "negative": [{"prompt": text} for text in others],
        "top_k": CANDIDATES,
    }
    found = study(server, f"/v1/saes/{sae}/contrast", body)["positive"]
    return [entry["feature"] for entry in found]


def best(tried: Sequence[Tried], unsteered: Sequence[str]) -> Tried:
    """The one that is reported."""
    return max(tried, key=lambda t: (t.works(unsteered), t.on_topic, -t.strength, -t.repeated))


def report(
    server: LiveServer, sae: str, record: Record, plain: Sequence[str]
) -> list[dict[str, Any]]:
    """Try the candidates of a dictionary and report the best.

    Args:
        server: that answers.
        sae: name of the dictionary.
        record: of the figures.
        plain: unsteered answers to `SELECTION` and `REPORT`, one after the other.
    """
    selection, reported = plain[: len(SELECTION)], plain[len(SELECTION) :]

    def measured(topic: Topic, feature: int, strength: float, prompts: Sequence[str]) -> Tried:
        steering = clamped(sae, feature, strength)
        return Tried(topic, feature, strength, answers(server, prompts, steering, MAX_TOKENS))

    tried = [
        measured(topic, feature, strength, SELECTION)
        for topic in TOPICS
        for feature in candidates(server, sae, topic)
        for strength in STRENGTHS
    ]
    chosen = best(tried, selection)
    again = measured(chosen.topic, chosen.feature, chosen.strength, REPORT)
    rows = []
    for prompts, unsteered, its in (("selection", selection, tried), ("report", reported, [again])):
        for one in its:
            figures = {
                "dictionary": sae, "prompts": prompts, "topic": one.topic.name,
                "feature": one.feature, "strength": one.strength, "on_topic": one.on_topic,
                "unsteered": mean(map(one.topic.shown_in, unsteered)), "repeated": one.repeated,
                "works": one.works(unsteered),
            }  # fmt: skip
            record.add(**figures)
            rows.append({**figures, "answers": one.texts})
    return rows


def main() -> None:
    """Serve the dictionaries, look for features and write the JSON."""
    parser = arguments(__doc__)
    names = [*SMALL_DICTIONARIES]
    parser.add_argument("--dictionaries", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    record = Record(
        "dictionary_features",
        "Share of answers on a topic with one feature clamped to a multiple of its maximum.",
        {
            "selection": len(SELECTION),
            "report": len(REPORT),
            "max_tokens": MAX_TOKENS,
            "repetition_penalty": REPETITION_PENALTY,
        },
    )
    path: Path = args.json or RESULTS / f"{record.name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"results": [], "rows": []}
    record.results += [r for r in kept["results"] if r["dictionary"] not in args.dictionaries]
    rows = [r for r in kept["rows"] if r["dictionary"] not in [None, *args.dictionaries]]
    record.kept["rows"] = rows
    with served(*(f"{name}={SMALL_DICTIONARIES[name]}" for name in args.dictionaries)) as server:
        plain = answers(server, [*SELECTION, *REPORT], None, MAX_TOKENS)
        rows.append({"dictionary": None, "answers": plain})
        for name in args.dictionaries:
            rows += report(server, name, record, plain)
            record.save(path)


if __name__ == "__main__":
    main()
