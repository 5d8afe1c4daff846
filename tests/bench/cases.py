"""What the 32 concurrent requests of a throughput benchmark ask for, and its table.

Decode-heavy is 16 prompt tokens and 32 generated ones; prefill-heavy is 64 prompt tokens and one
generated one, 2,048 tokens to compute. K configurations of clamps are dealt to the requests in
turn. A TopK SAE's edits need a full encode of every token that they touch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from tests.bench.alternate import Compared, Run, alternate, paired, ratios
from tests.bench.record import Record, spread

REQUESTS: Final = 32
SAE_NAME: Final = "demo"
TOPK_NAME: Final = "topk"
D_SAE: Final = 4608

Field = Mapping[str, Any] | None


@dataclass(frozen=True)
class Shape:
    """Tokens of each request."""

    name: str
    prompt: int
    generated: int

    @property
    def counted(self) -> int:
        """Tokens of a whole run that its throughput counts."""
        return REQUESTS * (self.generated if self.generated > 1 else self.prompt)


DECODE: Final = Shape("decode", 16, 32)
PREFILL: Final = Shape("prefill", 64, 1)
SHAPES: Final = (DECODE, PREFILL)


@dataclass(frozen=True)
class Case:
    """The requests' configurations; none of them is the control."""

    name: str
    configurations: int
    edits: int
    sae: str = SAE_NAME
    share: float = 1.0

    def fields(self) -> list[Field]:
        """The ``steering`` of each request."""
        if not self.configurations:
            return [None] * REQUESTS
        configurations = steering(self.configurations, self.edits, self.sae)
        steered = dealt(configurations, round(REQUESTS * self.share))
        return [*steered, *[None] * (REQUESTS - len(steered))]


CONTROL: Final = Case("unsteered (control)", 0, 0)
TOPK: Final = Case("TopK, half steered", 16, 8, TOPK_NAME, 0.5)
SHORT: Final = (CONTROL, Case("steered", 1, 8), Case("steered", REQUESTS, 8), TOPK)
FULL: Final = (
    CONTROL,
    *(Case("steered", k, edits) for edits in (1, 8, 64) for k in (1, 8, REQUESTS)),
    TOPK,
)


def steering(
    configurations: int, edits: int, sae: str = SAE_NAME, seed: int = 0
) -> list[dict[str, Any]]:
    """Distinct configurations, each of ``edits`` clamps of features of its own."""
    features = random.Random(seed).sample(range(D_SAE), configurations * edits)
    return [
        {
            "interventions": [
                {"sae": sae, "feature": feature, "op": "clamp", "value": 5.0}
                for feature in features[i * edits : (i + 1) * edits]
            ]
        }
        for i in range(configurations)
    ]


def dealt(configurations: Sequence[Field], n: int) -> list[Field]:
    """One configuration for each of ``n`` requests, in turn."""
    return [configurations[i % len(configurations)] for i in range(n)]


def compare(
    record: Record,
    cases: Sequence[Case],
    rounds: int,
    run: Callable[[Shape, list[Field]], Run],
    edited_tokens: Callable[[], float],
) -> None:
    """Run every case of both shapes against unsteered requests, and fill the table.

    Args:
        run: the requests of a shape with their ``steering``.
        edited_tokens: how many tokens the engine has edited so far.
    """
    for shape in SHAPES:
        edited = edits_of(shape, cases, run, edited_tokens)
        found = alternate(
            partial(run, shape, CONTROL.fields()),
            {case: partial(run, shape, case.fields()) for case in cases},
            rounds,
            warm=False,  # each was just run
        )
        for case, compared in found.items():
            record.add(
                shape=shape.name,
                case=case.name,
                configurations=case.configurations,
                edits=case.edits,
                edited_tokens=edited[case],
                tokens_per_second=spread([shape.counted / one.run.seconds for one in compared]),
                **ratios(compared),
            )
        hold_to_targets(record, shape, found)


def edits_of(
    shape: Shape,
    cases: Sequence[Case],
    run: Callable[[Shape, list[Field]], Run],
    edited_tokens: Callable[[], float],
) -> dict[Case, int]:
    """Tokens that one run of each case edits, by the engine's own count: it does steer."""
    found = {}
    for case in cases:
        before = edited_tokens()
        run(shape, case.fields())
        found[case] = int(edited_tokens() - before)
        assert (found[case] > 0) == (case.configurations > 0), (case, found[case])
    return found


def hold_to_targets(record: Record, shape: Shape, found: Mapping[Case, Sequence[Compared]]) -> None:
    """Steered to unsteered, most configurations to one, and TopK, each against its bound."""
    steered = {(c.configurations, c.edits): found[c] for c in found if c.name == "steered"}
    for edits in sorted({edits for _, edits in steered}):
        flat = paired(steered[REQUESTS, edits], steered[1, edits])
        record.add(
            shape=shape.name,
            case="K = 32 to K = 1",
            configurations="32 to 1",
            edits=edits,
            throughput_ratio=flat,
        )
        if edits == 8:
            ratio = ratios(steered[REQUESTS, edits])["throughput_ratio"]
            where = f"{record.name}, {shape.name}: "
            record.target(f"{where}steered / unsteered, 8 edits, K = 32", ratio, 0.98)
            record.target(f"{where}K = 32 / K = 1, 8 edits", flat, 0.98)
    if TOPK in found:
        ratio = ratios(found[TOPK])["throughput_ratio"]
        record.target(f"{record.name}, {shape.name}: TopK, half steered", ratio, 0.95)
