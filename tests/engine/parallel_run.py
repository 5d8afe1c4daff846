"""Generates with one, or several, worker processes and prints what came out as one JSON line.

Run as a script by the tests of tensor and pipeline parallelism: worker processes import the
main module, so it cannot be a test file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

#: Of the tiny Llama: four of 32.
WIDTH_OF_HEADS: Final = 128


def main() -> None:
    """Arguments: model folder, scratch folder, JSON of extra engine arguments."""
    from tests.engine.engine import tiny_engine
    from tests.engine.test_traps import GENERATION_ONLY, OTHER, STRONG, reporting, tokens

    model, folder, arguments = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    heads = {"layer": 3, "hook_kind": "attn.hook_z", "d_in": WIDTH_OF_HEADS, "seed": 2}
    saes = (
        {"layer": 0},
        {"layer": 3, "architecture": "standard", "seed": 1},
        {**heads, "threshold": 0.1},
        {**heads, "architecture": "topk", "layer": 2, "k": 8},
    )
    engine = tiny_engine(model, folder, saes, **arguments)
    both: dict[str, Any] = {
        "interventions": [
            {"sae": "a", "feature": 3, "op": "clamp", "value": 6},
            {"sae": "b", "feature": 5, "op": "add", "value": 4},
        ],
        "report": True,
        "read": {"sae": "b", "top_k": 2},
    }
    steered: tuple[dict[str, Any], ...] = (STRONG, OTHER, GENERATION_ONLY)
    named = [
        {**field, "interventions": [{**field["interventions"][0], "sae": "a"}]} for field in steered
    ]
    of_heads: dict[str, Any] = {
        "interventions": [
            {"sae": "c", "feature": 3, "op": "clamp", "value": 6},
            {"sae": "d", "feature": 9, "op": "scale", "value": 4},
            {"sae": "c", "feature": 7, "op": "add", "value": 3,
             "when": {"sae": "d", "feature": 2, "below": 0.0}},
        ],
        "max_share": 2.0,
        "report": True,
        "read": {"sae": "c", "top_k": 2},
    }  # fmt: skip
    reconstructed = {
        "interventions": of_heads["interventions"][:2],
        "error_term": False,
        "report": True,
    }
    fields = [None, both, *map(reporting, named), of_heads, reconstructed]
    made = engine.generate([tokens(700 + i, 12 + 9 * i) for i in range(len(fields))], fields)
    result = [
        {
            "tokens": m.tokens,
            "logprobs": m.logprobs,
            "steering": None
            if m.steering is None
            else {"report": m.steering[0].interventions, "read": m.steering[0].read},
        }
        for m in made
    ]
    print("RESULT " + json.dumps(result), flush=True)
    engine.shut_down()


if __name__ == "__main__":
    main()
