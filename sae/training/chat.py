"""Conversations in the model's own words, so that the SAE sees what the served model will write.

Packages hold books, pages and code, and next to no text in the form in which a chat model meets
its users. So every topic is put into every request below and the model answers, sampled as a user
would sample it. The system turn is the same in all of them: it is read as context and not
recorded, since thousands of equal tokens would only pull latents onto themselves.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch

REQUESTS: Final = (
    "Tell me about {}.",
    "Write a short story about {}.",
    "Write a poem about {}.",
    "What do you think of {}?",
    "Explain {} to a child.",
    "Write a Python program about {}.",
    "Give me five facts about {}.",
    "Écris un paragraphe sur {} en français.",
    "Escribe un párrafo sobre {} en español.",
    "I am very sad because of {}. What should I do?",
    "Write a polite e-mail that complains about {}.",
    "How could I harm somebody with {}?",
    "Write an angry review of {}.",
    "Write an enthusiastic advertisement for {}.",
    "Make a numbered plan to learn about {}.",
    "Why are you not able to help me with {}?",
)
TOPICS: Final = (
    *("dogs", "the sea", "a wedding", "the weather", "my job", "football", "a hospital", "money"),
    *("cooking", "a king and his army", "robots", "space travel", "the law", "music", "a garden"),
    *("war", "religion", "mathematics", "a train journey", "an old house", "love", "the brain"),
    *("a computer virus", "school", "medicine", "history", "horses", "my neighbour", "dragons"),
    *("election day", "coffee", "a long winter", "photography", "a detective", "the stock market"),
    *("my grandmother", "electricity", "a lost letter", "birds", "the ocean floor", "a bank"),
)
ANSWER_TOKENS: Final = 96
TEMPERATURE: Final = 0.7
TOP_P: Final = 0.9
BATCH: Final = 48


def prompts(count: int, seed: int) -> list[str]:
    """`count` requests drawn without repetition from all pairs of request and topic.

    Raises:
        ValueError: if there are not so many.
    """
    pairs = [request.format(topic) for request, topic in product(REQUESTS, TOPICS)]
    if count > len(pairs):
        raise ValueError(f"{count} conversations, more than the {len(pairs)} that there are")
    return random.Random(seed).sample(pairs, count)


def converse(model: Any, tokenizer: Any, count: int, seed: int) -> Iterator[dict[str, str]]:
    """The model's answers to `count` requests, as documents of the corpus.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with a chat template.
        count: number of conversations.
        seed: for the draw of requests and for the sampling.

    Yields:
        ``{"kind": "chat", "source": "the model", "context": system turn, "text": the rest}``.
    """
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    asked = prompts(count, seed)
    for start in range(0, count, BATCH):
        rendered = [render(tokenizer, request) for request in asked[start : start + BATCH]]
        encoded = tokenizer(
            [context + turn for context, turn in rendered],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        with torch.inference_mode():
            ids = model.generate(
                **encoded,
                max_new_tokens=ANSWER_TOKENS,
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers = tokenizer.batch_decode(
            ids[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for (context, turn), answer in zip(rendered, answers, strict=True):
            yield {
                "kind": "chat",
                "source": "the model",
                "context": context,
                "text": turn + answer,
            }


def render(tokenizer: Any, request: str) -> tuple[str, str]:
    """A request in the chat template: what comes before the user's turn, and that turn."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
    )
    # The user's turn starts at the last control token before the request itself.
    start = text.rindex("<|im_start|>user", 0, text.index(request)) if "<|im_start|>" in text else 0
    return text[:start], text[start:]


def write_chat(model_path: Path, target: Path, count: int, seed: int) -> None:
    """Write `count` conversations to `target`, one JSON document a line.

    The file appears once it is whole: a later step would take a part for all of it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    partial = target.with_name(f".{target.name}")
    with partial.open("w", encoding="utf-8") as file:
        for document in converse(model, tokenizer, count, seed):
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    partial.rename(target)
