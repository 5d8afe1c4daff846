"""Runs a notebook's cells in this process, and keeps what they print and plot.

``python -m tests.notebook server/offline.ipynb`` writes the outputs into the notebook.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

DPI: Final = 70

Cell = dict[str, Any]


def run(cells: list[Cell], namespace: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Run the code cells one after the other in one namespace.

    Yields:
        The outputs of each, as nbformat 4 has them: a stream, and a picture for each figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = 0
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        count += 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(_source(cell), f"<cell {count}>", "exec"), namespace)
        outputs: list[dict[str, Any]] = []
        if printed.getvalue():
            outputs.append({"name": "stdout", "output_type": "stream", "text": printed.getvalue()})
        for number in plt.get_fignums():
            outputs.append(_picture(plt.figure(number)))
        plt.close("all")
        yield outputs


def execute(path: Path) -> None:
    """Run a notebook and write its outputs into it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    results = run(notebook["cells"], {"__name__": "__main__"})
    for count, (cell, outputs) in enumerate(zip(code, results, strict=True), 1):
        cell["execution_count"], cell["outputs"] = count, outputs
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _source(cell: Cell) -> str:
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def _picture(figure: Any) -> dict[str, Any]:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    data = {"image/png": base64.b64encode(png.getvalue()).decode()}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    execute(Path(sys.argv[1]))
