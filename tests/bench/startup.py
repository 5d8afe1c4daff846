"""Opening many SAEs: 26 of 65,536 features, as for every layer of a 26-layer model.

``python -m tests.bench.startup [out.json] [--full]``

The files are sparse: full length, nothing on the disk, all weights zero, so pages are found without
a disk. At a width of 2,304 (Gemma-2-2B) each is 1.2 GB. What is timed is what a worker does with
them: open each (header, configuration), make the pool for the rows in use, and fetch the rows of
64 features into it. "check" is what the command line does before, once: it opens them too, and
scans those of up to 1 GB for non-finite weights, which reads all of them; at a width of 576
(SmolLM2-135M) each is 0.3 GB and is scanned. Each repetition runs in a process of its own; resident
memory is that of what was opened, beyond Python and torch themselves.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.bench.record import Record, arguments, spread

SAES: Final = 26
D_SAE: Final = 65536
D_IN: Final = 2304
SCANNED_D_IN: Final = 576
REQUESTED: Final = 64  # features whose rows are then asked for

_OPEN = """
import json, sys, time
from pathlib import Path
import psutil, torch
from sae.sae import open_sae
from sae.source import SAEReference
from server.start.checked_sae import check
from steering.request.plan import RowKey
from steering.worker.rows import RowPool

def resident():
    return psutil.Process().memory_info().rss

requested, paths = int(sys.argv[1]), sys.argv[2:]
before = resident()
started = time.perf_counter()
saes = [open_sae(SAEReference(Path(p).name, p, path=p)) for p in paths]
opened = time.perf_counter() - started
after = resident()
pool = RowPool(saes, 256, saes[0].card.d_in, "cpu")
started = time.perf_counter()
pool.acquire([RowKey(len(saes) - 1, latent) for latent in range(requested)])
fetched = time.perf_counter() - started
started = time.perf_counter()
for p in paths:
    check(f"{Path(p).name}={p}")
print(json.dumps({
    "open_seconds": opened,
    "open_megabytes": (after - before) / 1e6,
    "rows_milliseconds": 1e3 * fetched,
    "check_seconds": time.perf_counter() - started,
}))
"""


def sparse_sae(folder: Path, layer: int, d_in: int, d_sae: int = D_SAE) -> Path:
    """A JumpReLU SAE in SAELens' format whose weights are a hole in its file."""
    folder.mkdir(parents=True)
    card = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(card))
    header: dict[str, object] = {}
    end = 0
    for name, shape in (
        ("W_enc", [d_in, d_sae]),
        ("W_dec", [d_sae, d_in]),
        ("b_enc", [d_sae]),
        ("b_dec", [d_in]),
        ("threshold", [d_sae]),
    ):
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "sae_weights.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def opened(paths: Sequence[Path], requested: int) -> dict[str, float]:
    """Open SAEs in a process of their own and say what it took."""
    found: dict[str, float] = json.loads(
        subprocess.run(
            [sys.executable, "-c", _OPEN, str(requested), *map(str, paths)],
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
    )
    return found


def main() -> None:
    """Open them again and again, and write the JSON."""
    args = arguments(__doc__).parse_args()
    repeats = 7 if args.full else 3
    record = Record(
        "startup",
        f"Opening {SAES} SAEs of {D_SAE:,} features: medians (quartiles).",
        {"repeats": repeats, "rows_requested": REQUESTED},
    )
    with tempfile.TemporaryDirectory() as folder:
        for d_in in (D_IN, SCANNED_D_IN):
            paths = [sparse_sae(Path(folder) / f"{d_in}-l{i}", i, d_in) for i in range(SAES)]
            gigabytes = (paths[0] / "sae_weights.safetensors").stat().st_size / 1e9
            found = [opened(paths, REQUESTED) for _ in range(repeats)]
            columns = {name: spread([one[name] for one in found]) for name in found[0]}
            record.add(saes=SAES, d_sae=D_SAE, d_in=d_in, gigabytes_each=gigabytes, **columns)
            if d_in == D_IN:
                what = f"opening {SAES} SAEs of {D_SAE:,} x {D_IN:,}, "
                record.target(what + "seconds", columns["open_seconds"], 2.0, at_most=True)
                record.target(what + "resident MB", columns["open_megabytes"], 200.0, at_most=True)
    record.save(args.json)


if __name__ == "__main__":
    main()
