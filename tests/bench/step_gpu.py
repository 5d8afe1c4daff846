"""Steps of an 8B model on a GPU, steered and not, beside the roofline's: weights are random.

``python -m tests.bench.step_gpu [out.json] [--rounds N] [--rehearse]``

The model has Llama-3.1-8B's shape and no trained weight (``load_format="dummy"``), so nothing is
fetched; its SAEs have 32,768 latents. The time of a decode step is that between tokens once every
prompt of the batch is computed, at a context of about a thousand tokens, in alternation with the
same batch unsteered. CUDA graphs,
sampling and the scheduler are in it, and in neither prediction: the step measured is longer than
the one predicted, and what steering adds is the difference that counts. ``--rehearse`` does it with
a tiny model on whatever vLLM runs on; its times mean nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from safetensors.torch import save_file

from tests.bench.alternate import Compared, Run, alternate
from tests.bench.kernel_gpu import this_device
from tests.bench.record import Record, Rounds, arguments, spread
from tests.bench.roofline import H100, LLAMA_8B, Device, decode_seconds, op_seconds, whole_seconds
from tests.models import make_tokenizer

ROUNDS: Final = Rounds(short=3, full=8)
EDITS: Final = 8
SAE, TOPK = "rows", "topk"
#: What a decode step may grow by where every request of a batch has eight edits of its own.
MOST_GROWTH: Final = 0.01


@dataclass(frozen=True)
class Size:
    """What is run.

    Attributes:
        shape: of the model, as its configuration says it.
        layer: that is hooked.
        d_sae: latents of each SAE.
        batches: requests at once.
        context: tokens of a prompt.
        tokens: generated for each.
    """

    shape: dict[str, int]
    layer: int
    d_sae: int
    batches: tuple[int, ...]
    context: int
    tokens: int


LLAMA: Final = Size(
    {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    layer=16,
    d_sae=32768,
    batches=(1, 32, 256),
    context=960,
    tokens=128,
)
TINY: Final = Size(
    {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 640,  # more than the tokenizer knows, as the large one's is
    },
    layer=1,
    d_sae=256,
    batches=(1, 3),
    context=8,
    tokens=4,
)


def model(folder: Path, size: Size) -> Path:
    """A checkpoint's folder without a checkpoint."""
    import transformers

    config = transformers.LlamaConfig(
        **size.shape, max_position_embeddings=8192, dtype="bfloat16", tie_word_embeddings=False
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def sae(folder: Path, size: Size, architecture: str) -> Path:
    """A random SAE in SAELens' layout, bfloat16."""
    d_in, d_sae = size.shape["hidden_size"], size.d_sae
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(d_sae, d_in, generator=rng, dtype=torch.bfloat16) / d_in**0.5
    tensors = {
        "W_enc": rows.T.contiguous(),
        "W_dec": rows,
        "b_enc": torch.zeros(d_sae, dtype=torch.bfloat16),
        "b_dec": torch.zeros(d_in, dtype=torch.bfloat16),
    }
    more: dict[str, Any] = {"k": 64} if architecture == "topk" else {}
    if architecture == "jumprelu":
        tensors["threshold"] = torch.full((d_sae,), 0.5, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    card = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "bfloat16",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        **more,
        "metadata": {"hook_name": f"blocks.{size.layer}.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(card))
    return folder


def fields(name: str, batch: int, d_sae: int) -> list[dict[str, Any] | None]:
    """Of each request of a batch."""
    if name == "unsteered":
        return [None] * batch
    if name == "read":
        return [{"read": {"sae": SAE, "top_k": 5}}] * batch
    of = TOPK if name == "TopK" else SAE
    distinct = batch if name == "edits, all distinct" else 1
    return [
        {
            "interventions": [
                {"sae": of, "feature": (i % distinct * EDITS + e) % d_sae, "op": "clamp",
                 "value": 2.0}
                for e in range(EDITS)
            ]
        }
        for i in range(batch)
    ]  # fmt: skip


def predicted(device: Device, name: str, size: Size, batch: int) -> float:
    """Seconds that this adds to a step."""
    d_in = size.shape["hidden_size"]
    if name == "unsteered":
        return 0.0
    if name in ("read", "TopK"):
        return whole_seconds(device, d_in, size.d_sae, 2, batch)
    return op_seconds(device, d_in, 2, batch, EDITS, batch if "distinct" in name else 1)


CASES: Final = ("unsteered", "edits, one list", "edits, all distinct", "TopK", "read")


def step(llm: Any, prompts: Sequence[Any], steering: list[Any], tokens: int) -> Run:
    """The time between tokens of a batch that is sent at once."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    started = perf_counter()
    outputs = llm.generate(list(prompts), params, steering=steering, use_tqdm=False)
    seconds = perf_counter() - started
    times = [(out.metrics.first_token_ts, out.metrics.last_token_ts) for out in outputs]
    return Run(seconds, itl=decode_step(times, tokens))


def decode_step(times: Sequence[tuple[float, float]], tokens: int) -> float:
    """Seconds of a step in which nothing but decoding is done.

    Those between the tokens of the request whose prompt was computed last: others' tokens wait for
    prompts, of which a large batch has seconds.

    Args:
        times: of each request its first token and its last.
        tokens: of each.
    """
    first, last = max(times)
    return (last - first) / (tokens - 1)


def main() -> None:
    """Run every batch of every case, and write the JSON."""
    from steering import SteeringLLM

    parser = arguments(__doc__)
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, for its times' sake")
    args, rounds = ROUNDS.parse(parser)
    size, rounds = (TINY, 1) if args.rehearse else (LLAMA, rounds)
    known = None if args.rehearse else this_device()
    device = known or H100
    record = Record(
        "step_gpu",
        f"A decode step and what steering adds to it, beside what is predicted of {device.name}.",
        {"rounds": rounds, "edits": EDITS, "context": size.context, "d_sae": size.d_sae},
    )
    more: dict[str, Any] = {"kv_cache_memory_bytes": 64 * 2**20} if args.rehearse else {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        llm = SteeringLLM(
            str(model(root / "model", size)),
            saes=[
                f"{SAE}={sae(root / 'rows', size, 'jumprelu')}",
                f"{TOPK}={sae(root / 'topk', size, 'topk')}",
            ],
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=size.context + size.tokens,
            max_num_seqs=max(size.batches),
            enable_prefix_caching=False,
            disable_log_stats=False,
            enforce_eager=args.rehearse,
            **more,
        )
        with record.saved(args.json):
            for batch in size.batches:
                measure(record, llm, device, size, batch, rounds)
        llm.llm_engine.engine_core.shutdown()


def measure(record: Record, llm: Any, device: Device, size: Size, batch: int, rounds: int) -> None:
    """One batch: each case against the unsteered one, which is a case itself."""
    rng = torch.Generator().manual_seed(batch)
    ids = torch.randint(4, 300, (batch, size.context), generator=rng).tolist()
    prompts = [{"prompt_token_ids": one} for one in ids]
    runs: dict[str, Callable[[], Run]] = {
        name: partial(step, llm, prompts, fields(name, batch, size.d_sae), size.tokens)
        for name in CASES
    }
    expected = decode_seconds(device, LLAMA_8B, batch, size.context)
    for name, compared in alternate(runs["unsteered"], runs, rounds).items():
        adds = predicted(device, name, size, batch)
        ratio = spread([one.itl_ratio for one in compared])
        record.add(
            batch=batch,
            case=name,
            step_ms=spread([1e3 * one.run.itl for one in compared]),
            predicted_step_ms=1e3 * (expected + adds),
            ratio_to_unsteered=ratio,
            predicted_ratio=1 + adds / expected,
            adds_us=spread([1e6 * _added(one) for one in compared]),
            predicted_adds_us=1e6 * adds,
        )
        if name.startswith("edits"):
            what = f"decode step, batch {batch}, {name}: to unsteered"
            record.target(what, ratio, 1 + MOST_GROWTH, at_most=True)


def _added(one: Compared) -> float:
    return one.run.itl - (one.before.itl + one.after.itl) / 2


if __name__ == "__main__":
    main()
