"""What steering does to the text: features amplified, behaviours suppressed, and at what cost.

``python -m tests.bench.steering_effect [out.json] [--parts amplify suppress]``

Amplify. Every labelled feature of the demo SAE is clamped to 1.5 times its maximum activation on
the prompts `SELECTION`; those that work there, at most so many of a kind as `MOST_OF_A_KIND` says,
are reported on the prompts `REPORT` at 1, 1.5 and 2 times. An answer is on topic if its label's
test (``labels.jsonl`` beside the weights, written before) matches as often as that file says.

Suppress. For each of `BEHAVIOURS`, features are ranked by their mean activation on answers that
show it less that on answers that do not (contrast prompts), and the first 1, 4 and 16 are clamped
to 0 on the held-out prompts.

Cost is the perplexity of the answers under the unsteered model in relation to that of its own
answers to the same prompts; "repeated" is the share of an answer's word trigrams that occurred
before in it. Answers are greedy with a repetition penalty, as the demo's: plain greedy text of this
model degenerates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from statistics import mean
from typing import Any, Final

import torch
from torch.nn.functional import cross_entropy

from sae.features import FeatureTable
from sae.training.labels import Label, read_labels
from server.demo_model import ensure_demo_model
from tests.bench.cases import D_SAE
from tests.bench.demo_engine import SAE, demo_engine
from tests.bench.record import RESULTS, Record, arguments
from tests.bench.steering_prompts import BEHAVIOURS, REPORT, SELECTION, Behaviour
from tests.engine.engine import Engine

PARTS: Final = ("amplify", "suppress")
SAE_NAME: Final = "l14"
REPETITION_PENALTY: Final = 1.15
DTYPE: Final = "bfloat16"
SEQUENCES: Final = 64
SCORED_AT_ONCE: Final = 32

AMPLIFIED_TOKENS: Final = 40
SELECTED_AT: Final = 1.5
STRENGTHS: Final = (1.0, 1.5, 2.0)
#: A feature works if so many answers are on topic, so many of the unsteered ones at most, and the
#: text neither repeats itself nor costs more than this.
LEAST_ON_TOPIC: Final = 0.5
MOST_UNSTEERED: Final = 0.25
MOST_REPEATED: Final = 0.2
MOST_COST: Final = 10.0
MOST_OF_A_KIND: Final = {"topic": 7}
MOST_OF_ANOTHER_KIND: Final = 2
PICKED: Final = 14

SUPPRESSED_TOKENS: Final = 80
SET_SIZES: Final = (1, 4, 16)
#: With fewer answers on one side the contrast is against the answers to all other prompts.
FEWEST: Final = 4
READ_FEATURES: Final = 64

Field = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: decoded.
        tokens: its ids.
        prompt: ids before it.
        nll: mean negative log-likelihood of its tokens under the unsteered model, in nats.
        read: strongest features of each token, where the field asked for them.
    """

    text: str
    tokens: list[int]
    prompt: list[int]
    nll: float
    read: dict[str, Any] | None

    @property
    def repeated(self) -> float:
        """Share of word trigrams that occurred before."""
        words = self.text.split()
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


class Bench:
    """The engine that answers, and the plain model that says what an answer costs."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = ensure_demo_model()
        self.engine: Engine = demo_engine(
            {SAE_NAME: SAE}, eager=True, dtype=DTYPE, max_num_seqs=SEQUENCES
        )
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def answers(
        self, prompts: Sequence[str], fields: Sequence[Field | None], max_tokens: int
    ) -> list[Answer]:
        """An answer to each prompt with its field of steering, all in one batch."""
        from vllm import SamplingParams

        from steering.vllm.results import results_of

        ids = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            for prompt in prompts
        ]
        params = [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=0.0,
                repetition_penalty=REPETITION_PENALTY,
                extra_args=None if field is None else {"steering": dict(field)},
            )
            for field in fields
        ]
        requests: Any = [{"prompt_token_ids": prompt} for prompt in ids]
        outputs = self.engine.llm.generate(requests, params, use_tqdm=False)
        texts = [output.outputs[0].text for output in outputs]
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        reads = [
            results_of(self.engine.llm, output, its)[0].read if field and "read" in field else None
            for output, its, field in zip(outputs, params, fields, strict=True)
        ]
        nlls = self.nll(ids, tokens)
        return [Answer(*parts) for parts in zip(texts, tokens, ids, nlls, reads, strict=True)]

    def nll(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
        """Mean negative log-likelihood of each answer after its prompt, in nats."""
        found = []
        for start in range(0, len(prompts), SCORED_AT_ONCE):
            pairs = list(zip(prompts, answers, strict=True))[start : start + SCORED_AT_ONCE]
            length = max(len(prompt) + len(answer) for prompt, answer in pairs)
            ids = torch.tensor(
                [prompt + answer + [0] * (length - len(prompt) - len(answer))
                 for prompt, answer in pairs]
            )  # fmt: skip
            with torch.inference_mode():
                # Padding stands on the right and attention looks left: no mask is needed.
                hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
                for (prompt, answer), row in zip(pairs, hidden, strict=True):
                    at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
                    logits = self.model.lm_head(row[at]).float()
                    found.append(float(cross_entropy(logits, torch.tensor(answer))))
        return found


def cost(answers: Sequence[Answer], unsteered: Sequence[Answer]) -> float:
    """Perplexity of answers in relation to the unsteered ones', token by token."""
    return exp(_nll(answers) - _nll(unsteered))


def _nll(answers: Sequence[Answer]) -> float:
    tokens = sum(len(answer.tokens) for answer in answers)
    return sum(answer.nll * len(answer.tokens) for answer in answers) / tokens


def amplified(feature: int, strength: float) -> Field:
    """Clamp a feature to so many times its maximum activation."""
    return {
        "interventions": [{"feature": feature, "op": "clamp", "value": strength, "unit": "max_act"}]
    }


def suppressed(features: Sequence[int]) -> Field:
    """Clamp features to zero."""
    return {"interventions": [{"feature": f, "op": "clamp", "value": 0} for f in features]}


def on_topic(label: Label, answers: Sequence[Answer]) -> float:
    """Share of answers in which the label's test matches as often as it asks for."""
    return mean(label.matches(answer.text) >= label.in_answer for answer in answers)


def effect(
    label: Label, answers: Sequence[Answer], unsteered: Sequence[Answer]
) -> dict[str, float]:
    """The figures of one feature at one strength."""
    return {
        "on_topic": on_topic(label, answers),
        "on_topic_unsteered": on_topic(label, unsteered),
        "perplexity_ratio": cost(answers, unsteered),
        "repeated": mean(answer.repeated for answer in answers),
    }


def works(figures: Mapping[str, float]) -> bool:
    """Whether a feature steers visibly and coherently."""
    return (
        figures["on_topic"] >= LEAST_ON_TOPIC
        and figures["on_topic_unsteered"] <= MOST_UNSTEERED
        and figures["repeated"] <= MOST_REPEATED
        and figures["perplexity_ratio"] <= MOST_COST
    )


def picked(labels: Sequence[Label], figures: Sequence[Mapping[str, float]]) -> list[Label]:
    """Of the features that work, the most on topic (the cheapest of equals), not all of a kind."""
    order = sorted(
        (label_figures for label_figures in zip(labels, figures, strict=True)
         if works(label_figures[1])),
        key=lambda pair: (-pair[1]["on_topic"], pair[1]["perplexity_ratio"]),
    )  # fmt: skip
    taken: list[Label] = []
    for label, _ in order:
        of_its_kind = sum(other.kind == label.kind for other in taken)
        if of_its_kind < MOST_OF_A_KIND.get(label.kind, MOST_OF_ANOTHER_KIND):
            taken.append(label)
    return taken[:PICKED]


def amplify(bench: Bench, labels: Sequence[Label], record: Record) -> list[dict[str, Any]]:
    """Choose features on one set of prompts and report them on the other.

    Returns:
        A row for every feature, set of prompts and strength.
    """
    rows = []

    def measure(
        chosen: Sequence[Label], prompts: Sequence[str], strengths: Sequence[float], name: str
    ) -> list[dict[str, float]]:
        cases = [(label, strength) for label in chosen for strength in strengths]
        fields = [amplified(label.index, strength) for label, strength in cases]
        answers = bench.answers(
            [*prompts] * (1 + len(cases)),
            [None] * len(prompts) + [field for field in fields for _ in prompts],
            AMPLIFIED_TOKENS,
        )
        unsteered, steered = answers[: len(prompts)], answers[len(prompts) :]
        found = []
        for i, (label, strength) in enumerate(cases):
            its = steered[i * len(prompts) : (i + 1) * len(prompts)]
            found.append(effect(label, its, unsteered))
            print(name, label.index, label.label, strength, found[-1], flush=True)
            rows.append(
                {
                    "part": "amplify",
                    "prompts": name,
                    "feature": label.index,
                    "label": label.label,
                    "strength": strength,
                    **found[-1],
                    "nll": _nll(its),
                    "answers": [answer.text for answer in its],
                }
            )
        return found

    tried = measure(labels, SELECTION, [SELECTED_AT], "selection")
    chosen = picked(labels, tried)
    share = mean(works(figures) for figures in tried)
    record.settings |= {"tried": len(labels), "share_that_works": share}
    reported = measure(chosen, REPORT, STRENGTHS, "report")
    for i, label in enumerate(chosen):
        of_label = reported[i * len(STRENGTHS) : (i + 1) * len(STRENGTHS)]
        for strength, figures in zip(STRENGTHS, of_label, strict=True):
            record.add(
                part="amplify", what=f"{label.index}: {label.label}",
                edit=f"clamp {strength:g} x max", shown=figures["on_topic"],
                unsteered=figures["on_topic_unsteered"],
                perplexity_ratio=figures["perplexity_ratio"], repeated=figures["repeated"],
            )  # fmt: skip
    return rows


def activations(answer: Answer, d_sae: int) -> torch.Tensor:
    """Mean activation of every feature over an answer's tokens: `[d_sae]`."""
    assert answer.read is not None
    total = torch.zeros(d_sae)
    generated = [token for token in answer.read["tokens"] if token["phase"] == "generation"]
    for token in generated:
        for feature, value in token["features"]:
            total[feature] += value
    return total / max(1, len(generated))


def contrast(with_it: Sequence[torch.Tensor], without: Sequence[torch.Tensor]) -> list[int]:
    """Features by their mean activation with a behaviour less that without, largest first."""
    difference = torch.stack([*with_it]).mean(dim=0) - torch.stack([*without]).mean(dim=0)
    order: list[int] = difference.argsort(descending=True).tolist()
    return order


def suppress(bench: Bench, table: FeatureTable, record: Record) -> list[dict[str, Any]]:
    """Find each behaviour's features by contrast and clamp the first few to zero.

    Returns:
        A row for every behaviour and set of features.
    """
    read = {"read": {"sae": SAE_NAME, "top_k": READ_FEATURES}}
    contrasted: dict[tuple[str, ...], list[tuple[Answer, torch.Tensor]]] = {}
    for prompts in dict.fromkeys(behaviour.contrast for behaviour in BEHAVIOURS):
        answers = bench.answers(prompts, [read] * len(prompts), SUPPRESSED_TOKENS)
        contrasted[prompts] = [(answer, activations(answer, table.d_sae)) for answer in answers]

    def ranked(behaviour: Behaviour) -> list[int]:
        own = contrasted[behaviour.contrast]
        everything = [pair for pairs in contrasted.values() for pair in pairs]
        with_it = [mean_f for answer, mean_f in own if behaviour.shown_in(answer.text)]
        without = [mean_f for answer, mean_f in own if not behaviour.shown_in(answer.text)]
        if min(len(with_it), len(without)) < FEWEST:
            with_it = [f for answer, f in everything if behaviour.shown_in(answer.text)]
            without = [f for answer, f in everything if not behaviour.shown_in(answer.text)]
        return contrast(with_it, without) if with_it and without else []

    rows = []
    for behaviour in BEHAVIOURS:
        order = ranked(behaviour)
        if not order:
            print(f"no answer, or every one, shows {behaviour.name}: no contrast", flush=True)
            continue
        sets = [order[:size] for size in SET_SIZES]
        fields: list[Field | None] = [None, *map(suppressed, sets)]
        n = len(behaviour.held_out)
        answers = bench.answers(
            [*behaviour.held_out] * len(fields),
            [field for field in fields for _ in range(n)],
            SUPPRESSED_TOKENS,
        )
        for i, features in enumerate([[], *sets]):
            its = answers[i * n : (i + 1) * n]
            shown = mean(behaviour.shown_in(answer.text) for answer in its)
            figures = {
                "perplexity_ratio": cost(its, answers[:n]),
                "repeated": mean(answer.repeated for answer in its),
            }
            rows.append(
                {
                    "part": "suppress",
                    "behaviour": behaviour.name,
                    "features": features,
                    "labels": [table.label(feature) for feature in features],
                    "shown": shown,
                    **figures,
                    "answers": [answer.text for answer in its],
                }
            )
            if features:
                record.add(
                    part="suppress", what=behaviour.name, edit=f"{len(features)} to 0", shown=shown,
                    unsteered=rows[-1 - i]["shown"], **figures,
                )  # fmt: skip
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="keeps the others")
    args = parser.parse_args()
    path = args.json or RESULTS / "steering_effect.json"
    kept = json.loads(path.read_text()) if path.exists() else {"settings": {}}
    record = Record(
        "steering_effect",
        "Share of answers that show what a feature is labelled with, or a behaviour; its cost.",
        {**kept["settings"], "sae": SAE.name, "dtype": DTYPE,
         "repetition_penalty": REPETITION_PENALTY, "amplified_tokens": AMPLIFIED_TOKENS,
         "suppressed_tokens": SUPPRESSED_TOKENS},
    )  # fmt: skip
    for part in {*PARTS} - {*args.parts}:
        record.results += [row for row in kept.get("results", ()) if row["part"] == part]
    rows = [row for row in kept.get("rows", ()) if row["part"] not in args.parts]
    bench = Bench()
    if "amplify" in args.parts:
        rows += amplify(bench, read_labels(SAE / "labels.jsonl"), record)
    if "suppress" in args.parts:
        rows += suppress(bench, FeatureTable.open(SAE, D_SAE), record)
    bench.engine.shut_down()
    record.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
