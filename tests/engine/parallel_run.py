"""Generates with one, or several, worker processes and prints what came out as one JSON line.

Run as a script by the tests of tensor and pipeline parallelism: worker processes import the
main module, so it cannot be a test file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Arguments: model folder, scratch folder, JSON of extra engine arguments."""
    from tests.engine.engine import tiny_engine
    from tests.engine.outputs import GENERATION_ONLY, OTHER, STRONG, reporting, tokens

    model, folder, arguments = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    saes = ({"layer": 0}, {"layer": 3, "architecture": "standard", "seed": 1})
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
    fields = [None, both, *map(reporting, named)]
    made = engine.generate([tokens(700 + i, 12 + 9 * i) for i in range(5)], fields)
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
