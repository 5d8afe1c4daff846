"""Steered answers of the demo model, and what they cost under the model without steering."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, nan
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.functional import cross_entropy

from sae.arrays import FloatArray
from sae.discovery import attribution
from sae.sae import open_sae
from sae.source import SAEReference
from server.commands.demo_model import ensure_demo_model
from tests.bench.demo_engine import SAE, SPECIAL_TOKENS, demo_engine
from tests.engine.engine import Engine

SAE_NAME: Final = "l14"
REPETITION_PENALTY: Final = 1.15
DTYPE: Final = "bfloat16"
SEQUENCES: Final = 64
KV_CACHE: Final = 2**29  # bytes: 64 sequences of 300 tokens, with as much to spare
SCORED_AT_ONCE: Final = 32

Field = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        question: what the user said.
        text: decoded.
        tokens: its ids.
        prompt: ids before it.
        nll: mean negative log-likelihood of its tokens under the unsteered model, in nats.
        read: strongest features of each token, where the field asked for them.
    """

    question: str
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
    """The engine that answers, and the plain model that says what an answer costs.

    Args:
        sae: folder of the SAE that steers.
        others: sources of further dictionaries, by name.
    """

    def __init__(self, sae: Path = SAE, others: Mapping[str, Path] | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = ensure_demo_model()
        self.engine: Engine = demo_engine(
            {SAE_NAME: sae, **(others or {})},
            eager=True,
            dtype=DTYPE,
            max_num_seqs=SEQUENCES,
            kv_cache_memory_bytes=KV_CACHE,
        )
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.model.requires_grad_(False)
        self.sae = open_sae(SAEReference(SAE_NAME, str(sae)))
        self.W_dec = self.sae.decoder_rows(0, self.sae.card.d_sae)  # [d_sae, d_in]

    def answers(
        self,
        prompts: Sequence[str],
        fields: Sequence[Field | None],
        max_tokens: int,
        *,
        scored: bool = True,
    ) -> list[Answer]:
        """An answer to each prompt with its field of steering, all in one batch.

        Args:
            prompts: what the user says.
            fields: the `steering` of each.
            max_tokens: of an answer.
            scored: whether `Answer.nll` is wanted, which costs a pass; else it is nan.
        """
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
        nlls = self.nll(ids, tokens) if scored else [nan] * len(ids)
        parts = zip(prompts, texts, tokens, ids, nlls, reads, strict=True)
        return [Answer(*its_parts) for its_parts in parts]

    def attribution(self, answer: Answer, words: re.Match[str]) -> FloatArray:
        """What every feature adds to the log-probability of matched words, to first order.

        Returns:
            `[d_sae]`, over the tokens before the words and those of the words themselves.
        """
        ends = [
            len(self.tokenizer.decode(answer.tokens[: i + 1])) for i in range(len(answer.tokens))
        ]
        first = next(i for i, end in enumerate(ends) if end > words.start())
        last = next((i for i, end in enumerate(ends) if end >= words.end()), len(ends) - 1)
        ids = torch.tensor([answer.prompt + answer.tokens[: last + 1]])
        kept: list[torch.Tensor] = []

        def keep(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[0]

        handle = self.model.model.layers[self.sae.card.layer].register_forward_hook(keep)
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            handle.remove()
        at = torch.arange(len(answer.prompt) + first, ids.shape[1])
        gained = -cross_entropy(logits[at - 1].float(), ids[0, at], reduction="sum")
        [gradient] = torch.autograd.grad(gained, kept)
        x = kept[0].detach()[0].float()
        covered = (ids[0] >= SPECIAL_TOKENS) & (x.norm(dim=-1) <= (self.sae.card.sink_norm or inf))
        f = self.sae.encode(x[covered])
        gradients = gradient[0].float()[covered].numpy()
        return attribution(f.numpy(), gradients, self.W_dec.numpy())

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
    return exp(mean_nll(answers) - mean_nll(unsteered))


def mean_nll(answers: Sequence[Answer]) -> float:
    """Mean negative log-likelihood of a token of these answers, in nats."""
    tokens = sum(len(answer.tokens) for answer in answers)
    return sum(answer.nll * len(answer.tokens) for answer in answers) / tokens
