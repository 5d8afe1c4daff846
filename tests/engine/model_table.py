"""What is served of every model that vLLM knows, by hook point: a table from source text.

``python -m tests.engine.model_table`` writes ``model_table.txt``, one line a class of decoder
layers, and ``model_table.md``, a summary for readers. A new version of vLLM shows in the former
what changed. Configuration decides where a line says so; the model itself is asked when it loads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Final

import torch

from sae.card import HOOK_KINDS, HookPoint
from steering.vllm.forward_trace import NotUnderstood, traces
from steering.vllm.layer_form import Layer
from steering.vllm.source import Source
from steering.vllm.unsupported import UnsupportedModelError
from tests.engine.layer_classes import (
    ClassSource,
    LayerClass,
    architectures,
    backend_architectures,
    backend_layers,
    layer_classes,
    package,
)

TABLE: Final = Path(__file__).with_name("model_table.txt")
SUMMARY: Final = Path(__file__).with_name("model_table.md")
_ENCODER_DECODER: Final = ("CohereAsr", "NemotronParse", "Whisper")
_FLAG: Final = re.compile(r"(?:not )?self\.(\w+)(?: is (?:not )?None)?")
_MOST_FLAGS: Final = 4
#: What vLLM's CPU build has not or does wrongly, without steering as well, and the models that are
#: not held against transformers therefore; `test_model_table.py` looks whether it is still so.
CPU_LIMITS: Final = {
    "`selective_scan_fwd` (Mamba 1) is missing": "Jamba, FalconMamba, Mamba",
    "`RotaryEmbedding` rotates heads wrongly that have a dimension of their own": (
        "Lfm2, Lfm2Moe, and DeepSeek's models without YaRN"
    ),
    "Gated DeltaNet runs in bfloat16 alone": (
        "Qwen3_5, and Qwen3Next, whose streams are held against transformers within its rounding"
    ),
}
#: The hook points as HOOK_KINDS has them when the table was written, whatever is added later.
KINDS: Final = tuple(
    kind
    for kind in HOOK_KINDS
    if kind
    in (
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_post",
        "hook_mlp_out",
        "hook_attn_out",
        "mlp.hook_out",
        "attn.hook_out",
    )
)


def table() -> dict[str, dict[str, str]]:
    """By architecture and layer class, what each hook point gets: a place, or why it is refused."""
    vllm, transformers = Source(package("vllm")), Source(package("transformers"))
    users: dict[tuple[str, LayerClass], list[str]] = defaultdict(list)
    rows: dict[str, dict[str, str]] = {}
    for name, (module, cls) in architectures(vllm).items():
        if name.startswith(_ENCODER_DECODER):
            continue
        found = layer_classes(vllm, module, cls)
        for layer in found:
            users["vllm", layer].append(name)
        if not found:
            rows[f"{name}: layers of its text model's own class"] = {}
    for name in backend_architectures(vllm):
        for layer in backend_layers(transformers, name):
            users["transformers", layer].append(name)
    for (origin, layer), names in users.items():
        source = vllm if origin == "vllm" else transformers
        title = f"{layer.name} ({origin} {layer.module.split('models.')[-1]}): {', '.join(names)}"
        subject = ClassSource(source, layer)
        rows[title] = {kind: _verdict(subject, layer, kind) for kind in KINDS}
    return rows


def _verdict(subject: ClassSource, layer: LayerClass, kind: str) -> str:
    # The second layer, so that what is said of the first alone does not count.
    whole = _place(subject, layer, kind)
    if not whole.startswith("refused"):
        return whole
    flags = _flags(subject)
    if not flags or len(flags) > _MOST_FLAGS:
        return whole
    verdicts = set()
    for choice in range(2 ** len(flags)):
        fixed = {flag: bool(choice >> i & 1) for i, flag in enumerate(flags)}
        verdicts.add(_place(subject.taking(fixed), layer, kind))
    served = sorted(verdict for verdict in verdicts if not verdict.startswith("refused"))
    refused = sorted(verdict for verdict in verdicts if verdict.startswith("refused"))
    if not served:
        return whole
    by = ", ".join(flags)
    return f"by configuration ({by}): " + " or ".join([*served, *refused[:1]])


def _place(subject: ClassSource, layer: LayerClass, kind: str) -> str:
    try:
        place = Layer(subject, layer.name, torch.bfloat16).place(HookPoint(1, kind))
    except UnsupportedModelError as error:
        reason = str(error).removeprefix(f"blocks.1.{kind}: {layer.name}: ")
        return f"refused: {reason[:110]}"
    where = place.path or "layer"
    summed = " + residual" if place.other is not None else ""
    return f"{where} {'output' if place.output else 'input'}{summed}"


def _flags(subject: ClassSource) -> list[str]:
    """The attributes that a forward asks, and that nothing but a configuration decides."""
    try:
        found = traces(subject, dtype=torch.bfloat16)
    except NotUnderstood:
        return []
    names = {
        match.group(1)
        for trace in found
        for condition in trace.decisions
        if (match := _FLAG.fullmatch(condition))
    }
    return sorted(names)


def lines(rows: dict[str, dict[str, str]]) -> str:
    """The table as it is kept: a title, then what each hook point gets."""
    return "".join(
        f"{title} | " + " | ".join(f"{kind}: {what}" for kind, what in row.items()) + "\n"
        for title, row in sorted(rows.items())
    )


def summary(rows: dict[str, dict[str, str]]) -> str:
    """Markdown for readers: architectures by what is served of them."""
    groups: dict[str, set[str]] = defaultdict(set)
    for title, row in rows.items():
        if row:
            groups["".join(_mark(row[kind]) for kind in KINDS)].update(
                name.strip() for name in title.split(": ", 1)[1].split(",")
            )
    head = "| " + " | ".join(f"`{kind}`" for kind in KINDS) + " | models |\n"
    body = "".join(
        "| "
        + " | ".join(_WORDS[mark] for mark in marks)
        + f" | {', '.join(map(_short, sorted(names)))} |\n"
        for marks, names in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    )
    note = "A model that is in several lines has layers of several classes. In vLLM's CPU build\n"
    limits = [f"{what}: {models}" for what, models in CPU_LIMITS.items()]
    note += ";\n".join(limits) + ".\n"
    return head + "|" + " --- |" * (len(KINDS) + 1) + "\n" + body + "\n" + note


_WORDS: Final = {"y": "yes", "n": "no", "c": "by configuration"}


def _mark(verdict: str) -> str:
    if verdict.startswith("refused"):
        return "n"
    return "c" if verdict.startswith("by configuration") else "y"


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(_short(name) for name in names))


def _short(architecture: str) -> str:
    return re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", architecture)


if __name__ == "__main__":
    made = table()
    TABLE.write_text(lines(made), encoding="utf-8")
    SUMMARY.write_text(summary(made), encoding="utf-8")
