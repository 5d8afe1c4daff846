"""What edits that react or hold cost: conditions, `reread`, `max_share`, in alternation.

``python -m tests.bench.reacting [out.json] [--full] [--rounds N]``

32 requests at once in one engine, as in ``throughput.py``, each of 8 clamps of features of its own.
Every condition holds on every token, so that what is measured is the reading of 8 more features and
all of the edits. `reread` and `max_share` are compared with the same edits without them.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any, Final

from sae.sae import open_sae
from sae.solve import gain_matrix
from sae.source import SAEReference
from tests.bench.alternate import Run, alternate, paired, ratios
from tests.bench.cases import D_SAE, REQUESTS, SAE_NAME, SHAPES, Field, Shape
from tests.bench.demo_engine import SAE, demo_engine, prompts, run
from tests.bench.record import Record, Rounds, arguments, spread

EDITS: Final = 8
#: A feature that is read again as so much of what was written; `reread` needs 0.2.
LEAST_SELF_GAIN: Final = 0.4
#: No activation is as large: a condition of at most this holds on every token.
NEVER_REACHED: Final = 1e5

CONTROL: Final = "unsteered (control)"
DELTA: Final = "8 edits"
CONDITIONS: Final = "8 edits, 8 conditions"
REREAD: Final = "8 edits, reread"
MAX_SHARE: Final = "8 edits, max_share"

ROUNDS: Final = Rounds(short=4, full=10)


def features() -> list[int]:
    """Features that `reread` takes, in an order that is the same in every run."""
    gains = gain_matrix(open_sae(SAEReference(SAE_NAME, str(SAE))), range(D_SAE))
    assert gains is not None
    found = [i for i, gain in enumerate(gains.diagonal().tolist()) if gain >= LEAST_SELF_GAIN]
    random.Random(0).shuffle(found)
    return found


def fields(case: str, of_features: list[int]) -> list[Field]:
    """The ``steering`` of each request."""
    if case == CONTROL:
        return [None] * REQUESTS
    found: list[Field] = []
    for request in range(REQUESTS):
        own = of_features[request * 2 * EDITS : (request + 1) * 2 * EDITS]
        edits: list[dict[str, Any]] = [
            {"feature": feature, "op": "clamp", "value": 5.0} for feature in own[:EDITS]
        ]
        field: dict[str, Any] = {"interventions": edits}
        if case == CONDITIONS:
            for edit, watched in zip(edits, own[EDITS:], strict=True):
                edit["when"] = {"feature": watched, "below": NEVER_REACHED}
        if case == REREAD:
            field["match"] = "reread"
        if case == MAX_SHARE:
            field["max_share"] = 0.1
        found.append(field)
    return found


def main() -> None:
    """Run every case of both shapes and write the JSON."""
    parser = arguments(__doc__)
    args, rounds = ROUNDS.parse(parser)
    record = Record(
        "reacting",
        "Conditions, reread and max_share in one engine, 32 requests at once: medians (quartiles).",
        {"rounds": rounds, "requests": REQUESTS, "edits": EDITS},
    )
    of_features = features()
    engine = demo_engine({SAE_NAME: SAE})

    def run_case(shape: Shape, case: str) -> Run:
        batch = prompts(REQUESTS, shape.prompt)
        return run(engine, batch, fields(case, of_features), shape.generated)

    for shape in SHAPES:
        cases = (CONTROL, DELTA, CONDITIONS, REREAD, MAX_SHARE)
        found = alternate(
            partial(run_case, shape, CONTROL),
            {case: partial(run_case, shape, case) for case in cases},
            rounds,
        )
        for case, compared in found.items():
            seconds = [one.run.seconds for one in compared]
            record.add(
                shape=shape.name,
                case=case,
                tokens_per_second=spread([shape.counted / one for one in seconds]),
                **ratios(compared),
            )
        record.target(
            f"{shape.name}: 8 edits with 8 conditions / unsteered",
            ratios(found[CONDITIONS])["throughput_ratio"],
            0.98,
        )
        for case in (REREAD, MAX_SHARE):
            record.target(
                f"{shape.name}: {case} / 8 edits", paired(found[case], found[DELTA]), 0.995
            )
    engine.shut_down()
    record.save(args.json)


if __name__ == "__main__":
    main()
