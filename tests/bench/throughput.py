"""Throughput and latency of steered against unsteered requests, in alternation in one engine.

``python -m tests.bench.throughput [out.json] [--full] [--eager] [--dtype D] [--rounds N]``

32 requests at once, from submission to the last token, through ``vllm.LLM`` in this process: no
HTTP, no tokenizer, no second process, so steering is a larger share than behind a server
(``over_http.py``). Cases and shapes are those of ``cases.py``, the way of comparing that of
``alternate.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from tests.bench.alternate import Run
from tests.bench.cases import FULL, REQUESTS, SAE_NAME, SHORT, TOPK_NAME, Field, Shape, compare
from tests.bench.demo_engine import SAE, demo_engine, edited_tokens, prompts, run, topk_sae
from tests.bench.record import Plot, Record, Rounds, arguments

ROUNDS: Final = Rounds(short=3, full=8)


def main() -> None:
    """Run every case and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--dtype", default="float32", help="of the model; default: float32")
    args, rounds = ROUNDS.parse(parser)
    record = Record(
        "throughput",
        "Steered against unsteered in one engine, 32 requests at once: medians (quartiles).",
        {"rounds": rounds, "requests": REQUESTS, "compiled": not args.eager, "dtype": args.dtype},
        Plot(x="configurations", y="throughput_ratio", series="shape, case, edits", line=1.0),
    )
    with tempfile.TemporaryDirectory() as folder:
        saes = {SAE_NAME: SAE, TOPK_NAME: topk_sae(Path(folder))}
        engine = demo_engine(saes, eager=args.eager, dtype=args.dtype)

        def run_shape(shape: Shape, fields: list[Field]) -> Run:
            return run(engine, prompts(REQUESTS, shape.prompt), fields, shape.generated)

        cases = FULL if args.full else SHORT
        with record.saved(args.json):
            compare(record, cases, rounds, run_shape, lambda: edited_tokens(engine))
        engine.shut_down()


if __name__ == "__main__":
    main()
