"""What passes cost that encode their tokens in full: TopK edits, reads, and no error term.

``python -m tests.bench.full_passes [out.json] [--full] [--rounds N]``

All 32 requests of ``throughput.py`` ask for the same: 8 clamps of a TopK SAE, a ``read`` of the
five strongest features, or 8 clamps with ``"error_term": false``; with the demo's SAE and its TopK
twin (4,608 features) and with random ones of 65,536, k = 64. "Added" is what a whole run takes
longer than the unsteered runs beside it, and "products" is the bare time of the matrix products
that cannot be avoided, for matrices of the same shape and as many tokens a pass: the encoder's for
every case, and the decoder's if the reconstruction is wanted. Their quotient says how near the path
is to its arithmetic; 1 would be nothing but the products.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import torch

from tests.bench.alternate import Compared, Run, alternate, ratios
from tests.bench.cases import D_SAE, REQUESTS, SHAPES, Field, Shape, steering
from tests.bench.demo_engine import D_MODEL, SAE, demo_engine, prompts, run, topk_sae
from tests.bench.record import Record, Rounds, arguments, spread
from tests.models import make_tiny_sae

LARGE: Final = 65_536
K: Final = 64
LAYER: Final = 14
FEATURES_READ: Final = 5

CONTROL: Final = "unsteered (control)"
#: By name: the SAE, what is asked of it, and whether its decoder multiplies every token too.
CASES: Final[dict[str, tuple[str, str, bool]]] = {
    "TopK edits, 4,608": ("topk", "edits", False),
    "read, 4,608": ("demo", "read", False),
    "no error term, 4,608": ("demo", "no error term", True),
    "TopK edits, 65,536": ("large_topk", "edits", False),
    "read, 65,536": ("large", "read", False),
    "no error term, 65,536": ("large", "no error term", True),
}
ROUNDS: Final = Rounds(short=3, full=8)


def sources(folder: Path) -> dict[str, Path]:
    """The SAEs by name; the large ones are random."""
    large = partial(make_tiny_sae, d_in=D_MODEL, d_sae=LARGE, layer=LAYER)
    return {
        "demo": SAE,
        "topk": topk_sae(folder / "topk"),
        "large": large(folder / "large", threshold=30.0),
        "large_topk": large(folder / "large_topk", architecture="topk", k=K),
    }


def fields(case: str) -> list[Field]:
    """The ``steering`` of each request."""
    if case == CONTROL:
        return [None] * REQUESTS
    sae, asked, _ = CASES[case]
    if asked == "read":
        return [{"read": {"sae": sae, "top_k": FEATURES_READ}}] * REQUESTS
    more = {"error_term": False} if asked == "no error term" else {}
    return [{**one, **more} for one in steering(REQUESTS, 8, sae)]


def tokens_of_passes(shape: Shape) -> list[int]:
    """Tokens of each pass of a run: the prompts in one, then one of every request."""
    return [REQUESTS * shape.prompt, *[REQUESTS] * (shape.generated - 1)]


def products(shape: Shape, d_sae: int, decoded: bool) -> float:
    """Seconds that the matrix products of a run take by themselves."""
    W_enc = torch.randn(d_sae, D_MODEL)
    W_dec = torch.randn(D_MODEL, d_sae)
    seconds = 0.0
    for tokens in tokens_of_passes(shape):
        x = torch.randn(tokens, D_MODEL)
        f = torch.randn(tokens, d_sae) if decoded else None
        started = perf_counter()
        torch.nn.functional.linear(x, W_enc)
        if f is not None:
            torch.nn.functional.linear(f, W_dec)
        seconds += perf_counter() - started
    return seconds


def added(compared: list[Compared]) -> list[float]:
    """Seconds that each run took longer than the mean of its neighbours."""
    return [c.run.seconds - (c.before.seconds + c.after.seconds) / 2 for c in compared]


def main() -> None:
    """Run every case of both shapes and write the JSON."""
    parser = arguments(__doc__)
    args, rounds = ROUNDS.parse(parser)
    record = Record(
        "full_passes",
        "Passes that encode their tokens in full, 32 requests of one kind: medians (quartiles).",
        {"rounds": rounds, "requests": REQUESTS, "threads": torch.get_num_threads()},
    )
    with tempfile.TemporaryDirectory() as name:
        engine = demo_engine(sources(Path(name)))

        def run_case(shape: Shape, case: str) -> Run:
            batch = prompts(REQUESTS, shape.prompt)
            return run(engine, batch, fields(case), shape.generated)

        for shape in SHAPES:
            found = alternate(
                partial(run_case, shape, CONTROL),
                {case: partial(run_case, shape, case) for case in (CONTROL, *CASES)},
                rounds,
            )
            for case, compared in found.items():
                row: dict[str, Any] = {"shape": shape.name, "case": case}
                row["throughput_ratio"] = ratios(compared)["throughput_ratio"]
                if case != CONTROL:
                    sae, _, decoded = CASES[case]
                    d_sae = LARGE if sae.startswith("large") else D_SAE
                    bare = [products(shape, d_sae, decoded) for _ in range(rounds)]
                    row["added_s"] = spread(added(compared))
                    row["products_s"] = spread(bare)
                    row["added / products"] = row["added_s"]["median"] / row["products_s"]["median"]
                record.add(**row)
        engine.shut_down()
    record.save(args.json)


if __name__ == "__main__":
    main()
