"""Steered against unsteered with every kind of dictionary, in alternation in one engine.

``python -m tests.bench.dictionaries [out.json] [--full] [--eager] [--rounds N]``

32 requests at once as in ``throughput.py``, each with 8 edits of one dictionary on the demo model:
a transcoder that reads the MLP's input and writes its output, an SAE of the attention's
heads, directions, a cross-layer transcoder that writes to 15 layers, and the demo's SAE beside
them. All but the last are random: what they cost does not depend on what they mean.
"""

from __future__ import annotations

import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from server.commands.demo_model import ensure_demo_model
from tests.bench.alternate import Run, alternate, ratios
from tests.bench.cases import REQUESTS, SHAPES, Field, Shape
from tests.bench.demo_engine import D_MODEL, NUM_LAYERS, SAE, prompts, run, settings
from tests.bench.record import Record, Rounds, add_clock, arguments, clock_of
from tests.engine.dictionaries import D_SAE, made, write
from tests.engine.engine import Engine
from tests.models import make_tiny_sae

EDITS: Final = 8
LAYER: Final = 14
CLT_PLACES: Final = 15

CONTROL: Final = "unsteered (control)"
#: Names of the dictionaries, and the least ratio of throughputs that each should keep.
GOALS: Final = {"sae": 0.98, "transcoder": 0.98, "heads": 0.98, "direction": 0.98, "clt": 0.95}

ROUNDS: Final = Rounds(short=4, full=10)


def sources(folder: Path) -> list[str]:
    """Every dictionary as ``--sae`` takes it."""
    transcoder = made(LAYER, "mlp.hook_in", D_MODEL, threshold=0.5)
    clt_layer = NUM_LAYERS - CLT_PLACES
    clt = made(clt_layer, "mlp.hook_in", D_MODEL, places=CLT_PLACES, threshold=0.5)
    heads = make_tiny_sae(
        folder / "heads", d_in=D_MODEL, d_sae=D_SAE, layer=LAYER, hook_kind="attn.hook_z"
    )
    vectors = np.random.default_rng(0).normal(size=(D_SAE, D_MODEL)).astype(np.float32)
    np.save(folder / "vectors.npy", vectors)
    return [
        f"sae={SAE}",
        f"transcoder={write(folder / 'transcoder', transcoder)}",
        f"heads={heads}",
        f"direction={folder / 'vectors.npy'},hook=blocks.{LAYER}.hook_resid_post",
        f"clt={write(folder / 'clt', clt)}",
    ]


def fields(case: str) -> list[Field]:
    """The ``steering`` of each request."""
    if case == CONTROL:
        return [None] * REQUESTS
    rng = random.Random(0)
    return [
        {
            "interventions": [
                {"sae": case, "feature": feature, "op": "clamp", "value": 1.0}
                for feature in rng.sample(range(D_SAE), EDITS)
            ]
        }
        for _ in range(REQUESTS)
    ]


def main() -> None:
    """Run every case of both shapes and write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    add_clock(parser)
    args, rounds = ROUNDS.parse(parser)
    record = Record(
        "dictionaries",
        "Each kind of dictionary, steered against unsteered, 32 requests: medians (quartiles).",
        {"rounds": rounds, "requests": REQUESTS, "edits": EDITS, "compiled": not args.eager},
    )
    from steering import SteeringLLM

    with tempfile.TemporaryDirectory() as name:
        model = ensure_demo_model()
        engine = Engine(
            SteeringLLM(str(model), sources(Path(name)), **settings(eager=args.eager)), model, {}
        )

        def run_case(shape: Shape, case: str) -> Run:
            return run(
                engine,
                prompts(REQUESTS, shape.prompt),
                fields(case),
                shape.generated,
                clock_of(args),
            )

        for shape in SHAPES:
            found = alternate(
                partial(run_case, shape, CONTROL),
                {case: partial(run_case, shape, case) for case in (CONTROL, *GOALS)},
                rounds,
            )
            for case, compared in found.items():
                record.add(shape=shape.name, case=case, **ratios(compared))
            for case, goal in GOALS.items():
                ratio = ratios(found[case])["throughput_ratio"]
                record.target(f"dictionaries, {shape.name}: {case}, 8 edits", ratio, goal)
        engine.shut_down()
    record.save(args.json)


if __name__ == "__main__":
    main()
