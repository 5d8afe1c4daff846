"""What a report costs: steered requests that ask for one against the same that do not.

``python -m tests.bench.reports [out.json] [--full] [--rounds N]``

256 requests of one edit each are sent at once to a real server, as in ``over_http.py``. Recording
is a part of every pass; fetching comes once, when a request ends, so short answers show it most.
The control is the requests without a report against themselves.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Final

from tests.bench.alternate import alternate, ratios
from tests.bench.cases import SAE_NAME, Field, Shape
from tests.bench.demo_engine import SAE
from tests.bench.over_http import ask, serve
from tests.bench.record import Record, Rounds, arguments
from tests.engine.server import LiveServer, wait_until_ready

REQUESTS: Final = 256
SHAPES: Final = (Shape("short answers", 16, 4), Shape("longer answers", 16, 24))
WITHOUT: Final = "no report (control)"
WITH: Final = "report"

ROUNDS: Final = Rounds(short=4, full=10)


def fields(report: bool) -> list[Field]:
    """A field of steering for each request; each has one edit of its own."""
    return [
        {
            "interventions": [{"feature": feature, "op": "clamp", "value": 1.0}],
            "report": report,
        }
        for feature in range(REQUESTS)
    ]


def main() -> None:
    """Start the server, run every shape with and without and write the JSON."""
    parser = arguments(__doc__)
    args, rounds = ROUNDS.parse(parser)
    record = Record(
        "reports",
        "Reports against none over HTTP, 256 steered requests at once: medians (quartiles).",
        {"rounds": rounds, "requests": REQUESTS},
    )
    with tempfile.TemporaryDirectory() as folder:
        server = serve(
            {SAE_NAME: SAE}, Path(folder) / "server.log", "--max-num-seqs", str(REQUESTS)
        )
        try:
            wait_until_ready(server)
            with record.saved(args.json):
                measure(record, server, rounds)
        except Exception:
            print(server.last_log_lines(), flush=True)
            raise
        finally:
            server.stop()


def measure(record: Record, server: LiveServer, rounds: int) -> None:
    """Every shape with reports and without."""
    for shape in SHAPES:
        plain = partial(ask, server, shape, fields(report=False))
        reporting = partial(ask, server, shape, fields(report=True))
        found = alternate(plain, {WITHOUT: plain, WITH: reporting}, rounds)
        for case, compared in found.items():
            record.add(shape=shape.name, case=case, **ratios(compared))
        ratio = ratios(found[WITH])["throughput_ratio"]
        record.target(f"reports, {shape.name}: with / without", ratio, 0.98)


if __name__ == "__main__":
    main()
