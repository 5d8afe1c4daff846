"""What an idle SAE changes in a compiled bfloat16 model, and which is nearer to float32.

``python -m tests.bench.bfloat16 [out.json] [--model gemma|demo] [--layer N] [--hook KIND]``

Twenty prompts at once, 32 greedy tokens each, by one engine after another: bfloat16 without an SAE,
the same again (the control), bfloat16 with an SAE that no request uses, float32. Log-probabilities
are compared on the same text, float32's own answers read as prompts, so that an answer that parts
early does not count for more. The script exits with 1 where the idle SAE changes anything.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

# Before vLLM is imported: it tells that to stay in this process.
from server.demo_model import ensure_demo_model
from tests.bench import demo_engine
from tests.bench.record import Record, arguments
from tests.bench.steering_prompts import REPORT, SELECTION
from tests.engine.engine import Engine, start
from tests.gemma_model import D_MODEL, NUM_LAYERS, ensure_gemma_model
from tests.models import make_tiny_sae

PROMPTS: Final = (*SELECTION, *REPORT)
TOKENS: Final = 32


@dataclass(frozen=True)
class Model:
    """A checkpoint under measurement.

    Attributes:
        layer: where the idle SAE sits unless told otherwise.
    """

    name: str
    folder: Path
    d_model: int
    num_layers: int
    layer: int


@dataclass(frozen=True)
class Answers:
    """What one engine says.

    Attributes:
        tokens: of each greedy answer.
        forced: log-probability of each token of the reference texts' answers.
    """

    tokens: list[list[int]]
    forced: list[list[float]]


def model_named(name: str) -> Model:
    """Gemma 3 270M, whose layers end in a norm, or the demo model, a Llama."""
    if name == "gemma":
        return Model("gemma-3-270m", ensure_gemma_model(), D_MODEL, NUM_LAYERS, 9)
    folder = ensure_demo_model()
    return Model("smollm2-135m", folder, demo_engine.D_MODEL, demo_engine.NUM_LAYERS, 14)


def engine(model: Model, dtype: str, saes: Mapping[str, Path]) -> Engine:
    """Compiled in bfloat16, eager in float32."""
    return start(
        model.folder,
        saes,
        d_model=model.d_model,
        num_layers=model.num_layers,
        special_token_ids=(),
        dtype=dtype,
        enforce_eager=dtype == "float32",
        max_num_seqs=len(PROMPTS),
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**29,
    )


def forced(engine: Engine, prompts: Sequence[list[int]], answers: list[list[int]]) -> Any:
    """Log-probabilities of the answers' tokens, read as prompts."""
    from vllm import SamplingParams

    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    requests: Any = [{"prompt_token_ids": text} for text in texts]
    outputs = engine.llm.generate(requests, params, use_tqdm=False)
    return [
        [output.prompt_logprobs[t][text[t]].logprob for t in range(len(prompt), len(text))]
        for prompt, text, output in zip(prompts, texts, outputs, strict=True)
    ]


def compare(left: Answers, right: Answers) -> dict[str, Any]:
    """How far two engines are apart."""
    pairs = list(zip(left.tokens, right.tokens, strict=True))
    apart = [
        abs(a - b)
        for one, other in zip(left.forced, right.forced, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return {
        "greedy_tokens_that_differ": sum(
            a != b for x, y in pairs for a, b in zip(x, y, strict=True)
        ),
        "of_tokens": sum(len(x) for x, _ in pairs),
        "answers_that_part": sum(x != y for x, y in pairs),
        "of_answers": len(pairs),
        "log_probability_mean": sum(apart) / len(apart),
        "log_probability_most": max(apart),
    }


def main() -> int:
    """Run the engines and write the JSON; 1 if the idle SAE changes anything."""
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=("gemma", "demo"), default="gemma")
    parser.add_argument("--layer", type=int, help="of the idle SAE")
    parser.add_argument("--hook", default="hook_resid_post", help="of the idle SAE")
    args = parser.parse_args()
    model = model_named(args.model)
    layer = model.layer if args.layer is None else args.layer

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    record = Record(
        "bfloat16",
        "An SAE loaded and unused in a compiled bfloat16 model, and the distance to float32.",
        {"model": model.name, "sae": f"blocks.{layer}.{args.hook}", "tokens": TOKENS},
    )
    answers: list[list[int]] = []

    def ask(dtype: str, saes: Mapping[str, Path]) -> Answers:
        running = engine(model, dtype, saes)
        made = running.generate(prompts, [None] * len(prompts), max_tokens=TOKENS)
        tokens = [each.tokens for each in made]
        answers[:] = answers or tokens  # float32's, which is asked first
        found = Answers(tokens, forced(running, prompts, answers))
        running.shut_down()
        return found

    exact = ask("float32", {})
    plain = ask("bfloat16", {})
    again = ask("bfloat16", {})
    with tempfile.TemporaryDirectory() as temporary:
        sae = make_tiny_sae(
            Path(temporary) / "sae", d_in=model.d_model, layer=layer, hook_kind=args.hook
        )
        idle = ask("bfloat16", {"idle": sae})
    record.add(case="no SAE, twice (control)", **compare(plain, again))
    record.add(case="idle SAE to no SAE", **compare(idle, plain))
    record.add(case="no SAE to float32", **compare(plain, exact))
    record.add(case="idle SAE to float32", **compare(idle, exact))
    record.save(args.json)
    return 0 if idle == plain else 1


if __name__ == "__main__":
    sys.exit(main())
