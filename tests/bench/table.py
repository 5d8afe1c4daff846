"""Tables and a plot of the kept results: ``tests/bench/README.md`` and ``results/plot.png``.

``python -m tests.bench.table [folder of results]``; `python -m tests.bench` runs it last.
Everything in the page is made from the JSON files but ``notes.md`` beside them, written by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.bench.record import RESULTS, Target, shown_value

PLOT: Final = "plot.png"
NOTES: Final = "notes.md"
ORDER: Final = (
    "throughput",
    "over_http",
    "reports",
    "reacting",
    "dictionaries",
    "full_passes",
    "streamed_reads",
    "studies",
    "contrast",
    "beside_study",
    "idle",
    "op_share",
    "op_alone",
    "pass_alone",
    "admission",
    "label_search",
    "first_paint",
    "peers",
    "startup",
    "serve_start",
    "read_again",
    "suppression",
    "conditional",
    "side_effects",
    "equal_kl",
    "every_feature",
    "study_figures",
    "suggestions",
    "set_search",
    "dose_search",
    "direction",
    "dictionary_features",
)

HEAD: Final = """\
# What steering costs

Made by `python -m tests.bench.table` from `results/*.json`, which `make bench` writes (a short set;
`make bench ARGS=--full` runs every case), but for `bfloat16`, `read_again`, `fuzz`, what is
measured on the demo SAE (`steering_effect`, `suppression`, `conditional`, `side_effects`,
`equal_kl`, `every_feature`, `study_figures`, `suggestions`, `set_search`, `dose_search`), and on
the small dictionaries of the tests (`direction`, `dictionary_features`), which are run by
themselves. Each script explains itself: `python -m tests.bench.NAME --help`.

Measured runs stand between runs of a reference, ratios are taken against the mean of the two, and
"control" is the reference measured against itself: its distance from 1 is the noise of the rest.
Figures are medians, with quartiles in brackets.
"""

Result = Mapping[str, Any]


def read(folder: Path) -> list[Result]:
    """The results in a folder, in the order of the page."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rank = {name: i for i, name in enumerate(ORDER)}
    return sorted(found, key=lambda result: rank.get(result["benchmark"], len(ORDER)))


def page(results: Sequence[Result], notes: str, plot: str | None) -> str:
    """The whole page in Markdown."""
    parts = [HEAD]
    if any(result["targets"] for result in results):
        parts.append(targets_section(results))
    if notes:
        parts.append(notes.strip())
    if plot is not None:
        parts.append(f"![the figures below, plotted]({plot})")
    machines = {json.dumps(result["machine"]): result["machine"] for result in results}
    for machine in machines.values():
        parts.append("## Machine\n\n" + ", ".join(f"{k} {v}" for k, v in machine.items()))
    parts += [section(result) for result in results]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def targets_section(results: Sequence[Result]) -> str:
    """Every target with what was measured, and by how much it is met or missed."""
    return "## Targets\n\n" + targets_table(results)


def targets_table(results: Sequence[Result]) -> str:
    """The table of `targets_section`."""
    rows = []
    for result in results:
        for raw in result["targets"]:
            target = Target(**raw)
            sign = "≤" if target.at_most else "≥"
            miss = abs(target.value["median"] - target.bound)
            verdict = "met" if target.met else f"**missed** by {shown_value(miss)}"
            bound = f"{sign} {target.bound:g}"
            rows.append({"figure": target.what, "target": bound, "measured": target.value,
                         "": verdict})  # fmt: skip
    return table(rows)


def section(result: Result) -> str:
    """One benchmark: what it is, how it was run, and its table."""
    before, after = (result["load_average"][when][0] for when in ("before", "after"))
    settings = ", ".join(f"{key} {setting(value)}" for key, value in result["settings"].items())
    load = f"load average {before:.1f} before, {after:.1f} after"
    return "\n\n".join(
        (
            f"## {result['benchmark']}",
            result["about"],
            f"`{result['command']}`: {settings}; {load}.",
            table(result["results"]),
        )
    )


def setting(value: Any) -> str:
    """A setting as the page shows it: lists as they would be typed."""
    return f"`{' '.join(map(str, value))}`" if isinstance(value, list) else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; columns in the order in which they first occur."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [[column.replace("_", " ") for column in columns], ["---"] * len(columns)]
    for row in rows:
        lines.append([shown_value(row[column]) if column in row else "" for column in columns])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: Sequence[Result], path: Path) -> bool:
    """One panel for each result that names a plot; false and no file if none does."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    plotted = [result for result in results if result["plot"] is not None]
    if not plotted:
        return False
    figure = Figure(figsize=(9, 4.5 * len(plotted)), layout="constrained")
    for axes, result in zip(
        figure.subplots(len(plotted), squeeze=False)[:, 0], plotted, strict=True
    ):
        panel(axes, result)
    figure.savefig(path, dpi=90)
    return True


def panel(axes: Any, result: Result) -> None:
    """Medians with quartiles as bars, a line for every series."""
    import matplotlib

    plot = result["plot"]
    series: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for row in result["results"]:
        x, y = row.get(plot["x"]), row.get(plot["y"])
        shown = all(row.get(name) == value for name, value in plot["where"].items())
        if shown and isinstance(x, int | float) and isinstance(y, dict):
            names = [name.strip() for name in plot["series"].split(",")]
            label = ", ".join(f"{value} {name}" if isinstance(value := row[name], int) else value
                              for name in names)  # fmt: skip
            series.setdefault(label, []).append((x, y))
    axes.set_prop_cycle(color=[matplotlib.colormaps["tab20"](i) for i in range(20)])
    for label, points in series.items():
        medians = [y["median"] for _, y in points]
        bars = [
            [y["median"] - y["low"] for _, y in points],
            [y["high"] - y["median"] for _, y in points],
        ]
        axes.errorbar([x for x, _ in points], medians, bars, marker="o", capsize=3, label=label)
    if plot["line"] is not None:
        axes.axhline(plot["line"], color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("symlog", base=2, linthresh=1)
    ticks = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    if plot["log_y"]:
        axes.set_yscale("log")
    only = ", ".join(f"{name} {value}" for name, value in plot["where"].items())
    axes.set_title(f"{result['benchmark']} ({only})" if only else result["benchmark"])
    axes.set_xlabel(plot["x"].replace("_", " "))
    axes.set_ylabel(plot["y"].replace("_", " "))
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))


def page_of(folder: Path) -> Path:
    """Where a folder's page is: the kept results have theirs above, others within."""
    return (folder.parent if folder.resolve() == RESULTS.resolve() else folder) / "README.md"


def write(folder: Path) -> None:
    """Read a folder of results and write the plot into it and the page that shows both."""
    readme = page_of(folder)
    results = read(folder)
    notes = folder / NOTES
    plot = folder / PLOT
    drawn = draw(results, plot)
    readme.write_text(
        page(
            results,
            notes.read_text() if notes.exists() else "",
            plot.relative_to(readme.parent).as_posix() if drawn else None,
        )
    )
    print(f"table: written to {readme}")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
