"""What reading as it happens costs: streamed reads beside reads that come with the end.

``python -m tests.bench.streamed_reads [out.json] [--full] [--rounds N]``

32 streamed requests at once to a real server, as in ``over_http.py``; each reads the five strongest
features of every token. The reference is the same reads, told at the end; the control is that
against itself, and requests that read nothing stand beside them.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.bench.alternate import alternate, ratios
from tests.bench.cases import DECODE, REQUESTS, SAE_NAME, Field
from tests.bench.demo_engine import SAE
from tests.bench.over_http import ask, serve
from tests.bench.record import Record, Rounds, arguments
from tests.engine.server import wait_until_ready

PLAIN: Final = "read at the end (control)"
STREAMED: Final = "streamed read"
NONE: Final = "no read"

ROUNDS: Final = Rounds(short=4, full=10)


def fields(case: str) -> list[Field]:
    """The ``steering`` of each request."""
    if case == NONE:
        return [None] * REQUESTS
    read: dict[str, Any] = {"top_k": 5}
    if case == STREAMED:
        read["stream"] = True
    return [{"read": read}] * REQUESTS


def main() -> None:
    """Start the server, run every case and write the JSON."""
    parser = arguments(__doc__)
    args, rounds = ROUNDS.parse(parser)
    record = Record(
        "streamed_reads",
        "Streamed reads against reads at the end over HTTP, 32 requests: medians (quartiles).",
        {"rounds": rounds, "requests": REQUESTS, "features_a_token": 5},
    )
    with tempfile.TemporaryDirectory() as folder:
        server = serve({SAE_NAME: SAE}, Path(folder) / "server.log")
        try:
            wait_until_ready(server)
            found = alternate(
                partial(ask, server, DECODE, fields(PLAIN)),
                {
                    case: partial(ask, server, DECODE, fields(case))
                    for case in (PLAIN, STREAMED, NONE)
                },
                rounds,
            )
            for case, compared in found.items():
                record.add(shape=DECODE.name, case=case, **ratios(compared))
        finally:
            server.stop()
    record.save(args.json)


if __name__ == "__main__":
    main()
