"""Requests of every kind that a GPU treats in its own way, and what the reference says of them.

One model and its dictionaries serve all engines: SAEs in SAELens' layout, whose reference is
`ReferenceModel`, and a transcoder or other of every kind, whose reference is `EditedPass`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.engine import SPECIAL_TOKEN_IDS
from tests.engine.kinds import NAMES, Kinds, edits, every_kind
from tests.engine.outputs import tokens
from tests.engine.reference import ReferenceModel, ReferenceSAE
from tests.models import make_tiny_model, make_tiny_sae, resemble

NUM_NEW: Final = 6
#: Decoded behind the prompt where a feature ends the answer.
MOST_NEW: Final = 12
#: Tokens of prompts, in turn.
LENGTHS: Final = (6, 11, 16, 21, 26)
#: Requests that an engine runs at once.
AT_ONCE: Final = 8
#: Tokens of a pass that graphs are captured for. By themselves they would end at twice `AT_ONCE`,
#: and most prompts would run eagerly.
CAPTURED: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Prompts that are tried for one whose tokens all come no nearer than this to a jump.
TRIED: Final = 12
FAR_ENOUGH: Final = 2e-2
D_SAE: Final = 128

SAES: Final[dict[str, dict[str, Any]]] = {
    "a": {"architecture": "jumprelu", "layer": 1},
    "b": {"architecture": "standard", "layer": 2, "seed": 1},
    "gate": {"architecture": "topk", "layer": 2, "seed": 2, "k": 16},
    "cross": {"architecture": "jumprelu", "layer": 3, "seed": 3},
}
#: The layers of the crosscoder one of whose slots is `cross`.
CROSSCODER: Final = (1, 3)

CLAMP: Final = {"sae": "a", "feature": 3, "op": "clamp", "value": 6.0}
ADD: Final = {"sae": "b", "feature": 5, "op": "add", "value": 4.0}
OF_A: Final = {"sae": "a", "feature": 7}

#: What needs rows alone, and so fits into graphs.
ROWS: Final[dict[str, dict[str, Any]]] = {
    "unsteered": {},
    "clamp": {"interventions": [CLAMP]},
    "window": {"interventions": [{**ADD, "positions": {"start": -6}}]},
    "prompt": {"interventions": [{**CLAMP, "op": "scale"}], "positions": {"generation": False}},
    "generation": {"interventions": [ADD, CLAMP], "positions": {"prompt": False}},
    "bounds": {
        "interventions": [
            {"sae": "b", "feature": 9, "op": "cap", "value": 0.2},
            {"sae": "b", "feature": 11, "op": "floor", "value": 3.0},
            {"sae": "b", "feature": 12, "op": "ablate"},
        ]
    },
    "many": {
        "interventions": [
            {"sae": "b", "feature": i, "op": "add", "value": 0.5 - i % 2} for i in range(64)
        ]
    },
    "condition": {"interventions": [{**ADD, "when": {**OF_A, "above": 0.0}}]},
    "so far": {"interventions": [{**ADD, "when": {**OF_A, "above": 0.0, "scope": "so_far"}}]},
    "by prompt": {
        "interventions": [CLAMP],
        "positions": {"prompt": False},
        "when": {"sae": "b", "feature": 2, "above": 0.0, "scope": "prompt"},
    },
    "reread": {"interventions": [CLAMP, {**CLAMP, "feature": 8}], "match": "reread"},
    "protect": {"interventions": [CLAMP], "protect": [{**OF_A}, {"sae": "a", "feature": 9}]},
    "limit": {"interventions": [{**CLAMP, "value": 20.0}], "max_share": 0.15},
    "crosscoder": {"interventions": [{"sae": "cross", "feature": 4, "op": "clamp", "value": 5.0}]},
}  # fmt: skip
#: What needs whole encodes.
WHOLE: Final[dict[str, dict[str, Any]]] = {
    "exact": {"interventions": [{"sae": "gate", "feature": 9, "op": "clamp", "value": 6.0}]},
    "by exact": {
        "interventions": [CLAMP],
        "positions": {"prompt": False},
        "when": {"sae": "gate", "feature": 2, "below": 1e5, "scope": "prompt"},
    },
    "reconstruction": {"interventions": [ADD], "error_term": False},
    "read": {"read": {"sae": "gate", "top_k": 4}},
    "edit and read": {"interventions": [CLAMP], "read": {"sae": "b", "top_k": 3}},
}  # fmt: skip
STOP: Final = "stop"
#: Those whose reference is `EditedPass`; its fields are made of features that fire.
OF_KINDS: Final = (
    *NAMES,
    *(f"reconstructed {name}" for name in NAMES if name != "clt"),
    "all kinds",
    "condition on a transcoder",
)
EVERY: Final = (*ROWS, *WHOLE, STOP, *OF_KINDS)

#: Sent at once: batches of some sizes, then everything. What might break an engine comes last.
WAVES: Final[dict[str, tuple[str, ...]]] = {
    "one": ("clamp",),
    "three": ("unsteered", "many", "condition"),
    "seven": ("unsteered", "clamp", "window", "generation", "reread", "limit", "crosscoder"),
    "one whole": ("exact",),
    "three whole": ("read", "unsteered", "clamp"),
    "nobody": ("unsteered",),
    "everything": EVERY,
}


@dataclass
class Battery:
    """The model, its dictionaries, the requests, and the reference.

    Attributes:
        reference: the model and the dictionaries in transformers.
        sources: of all, what ``--sae NAME=`` takes.
        requests: by name: ``prompt``, ``steering``, ``max_tokens``.
        text: what is scored: ``prompt``, ``completion``, ``steering``.
    """

    reference: Reference
    sources: dict[str, str]
    requests: dict[str, dict[str, Any]]
    text: dict[str, Any]

    def task(self, waves: Mapping[str, Any], steered: bool, arguments: dict[str, Any]) -> str:
        """What `engine_run` reads."""
        return json.dumps(
            {
                "checkpoint": str(self.reference.kinds.checkpoint),
                "saes": self.sources if steered else {},
                "requests": self.requests,
                "waves": waves,
                "scored": self.text,
                "arguments": arguments,
            }
        )

    def expected(
        self, name: str, answer: Mapping[str, Any]
    ) -> tuple[list[float], list[float], float]:
        """Log p of an answer's tokens, the same unsteered, and how near rounding came to decide."""
        request = self.requests[name]
        return self.reference.expected(
            request["prompt"], request["steering"], answer["tokens"], name in OF_KINDS
        )

    def seen(self, name: str, answer: Mapping[str, Any], sae: str) -> Tensor:
        """``[n, d_sae]`` of all tokens that entered, the answer's last one included."""
        request, reference = self.requests[name], self.reference
        ids, field = [*answer["tokens"], 0], request["steering"]
        _, trace = reference.model.trace(request["prompt"], ids, reference.saes, field)
        return reference.saes[sae].encode(trace.seen[sae])

    def nearest(self, name: str, answer: Mapping[str, Any], sae: str, feature: int) -> float:
        """How near a feature came to its jump on any token that entered."""
        request, reference = self.requests[name], self.reference
        ids, field = [*answer["tokens"], 0], request["steering"]
        _, trace = reference.model.trace(request["prompt"], ids, reference.saes, field)
        return float(reference.saes[sae].distance_to_jump(trace.seen[sae], [feature]).min())

    def kl(self) -> Tensor:
        """``[n]`` of the text that is scored."""
        text, reference = self.text, self.reference
        before, after = (
            reference.model.logprobs(text["prompt"], text["completion"], reference.saes, field)
            for field in (None, text["steering"])
        )
        return (before.double().exp() * (before.double() - after.double())).sum(-1)


@dataclass
class Reference:
    """The model with hooks, of both ways of writing dictionaries."""

    kinds: Kinds
    saes: dict[str, ReferenceSAE]
    model: ReferenceModel

    def expected(
        self, prompt: list[int], field: dict[str, Any] | None, made: list[int], of_kinds: bool
    ) -> tuple[list[float], list[float], float]:
        """See `Battery.expected`; ``made`` are the generated tokens."""
        chosen = range(len(made)), made
        if of_kinds:
            assert field is not None
            ids = [*prompt, *made][:-1]
            edited, steered = self.kinds.run(field, ids)
            _, clean = self.kinds.run({"interventions": []}, ids)
            steered, clean = steered[len(prompt) - 1 :], clean[len(prompt) - 1 :]
            return steered[chosen].tolist(), clean[chosen].tolist(), edited.nearest_jump()
        steered, trace = self.model.trace(prompt, made, self.saes, field)
        clean = self.model.logprobs(prompt, made, self.saes, None)
        features: dict[str, list[int]] = {}
        for item in (field or {}).get("interventions", ()):
            features.setdefault(item["sae"], []).append(item["feature"])
        whole = not (field or {}).get("error_term", True)
        jumps = [
            float(self.saes[sae].distance_to_jump(trace.seen[sae], None if whole else of).min())
            for sae, of in features.items()
        ]
        return steered[chosen].tolist(), clean[chosen].tolist(), min([trace.nearest, *jumps])

    def prompt(self, seed: int, length: int, field: dict[str, Any], of_kinds: bool) -> list[int]:
        """A prompt whose own tokens keep as far from every jump as one that can be found."""
        best, farthest = tokens(seed, length), -1.0
        for attempt in range(TRIED):
            ids = tokens(seed + 1000 * attempt, length)
            *_, nearest = self.expected(ids, field or None, [0], of_kinds and bool(field))
            if nearest > farthest:
                best, farthest = ids, nearest
            if farthest >= FAR_ENOUGH:
                break
        return best


def battery(root: Path) -> Battery:
    """Write everything into a folder."""
    kinds = every_kind(make_tiny_model(root / "tiny", "llama"), root)
    folders = {name: make_tiny_sae(root / name, d_sae=D_SAE, **how) for name, how in SAES.items()}
    for folder in folders.values():
        resemble(folder)
    sources = {**kinds.sources, **{name: str(folder) for name, folder in folders.items()}}
    sources["cross"] = _crosscoder(root / "crosscoder", folders["cross"])
    saes = {name: ReferenceSAE(folder) for name, folder in folders.items()}
    reference = Reference(kinds, saes, ReferenceModel(kinds.checkpoint, SPECIAL_TOKEN_IDS))
    fields = {**ROWS, **WHOLE, **_of_kinds(kinds), STOP: {}}
    prompts = {
        name: reference.prompt(40 + i, LENGTHS[i % len(LENGTHS)], fields[name], name in OF_KINDS)
        for i, name in enumerate(EVERY)
    }
    _, trace = reference.model.trace(prompts[STOP], [0], saes, None)
    often = int((saes["a"].encode(trace.seen["a"][1:]) > 0).sum(0).argmax())
    fields[STOP] = {"stop_when": {"sae": "a", "feature": often, "above": 0.0}}
    requests = {
        name: {
            "prompt": prompts[name],
            "steering": {**fields[name], "report": True} if fields[name] else None,
            "max_tokens": MOST_NEW if name == STOP else NUM_NEW,
        }
        for name in EVERY
    }
    text = {
        "prompt": tokens(1, 30),
        "completion": tokens(2, 21)[1:],
        "steering": {"interventions": [CLAMP, ADD]},
    }
    return Battery(reference, sources, requests, text)


def _of_kinds(kinds: Kinds) -> dict[str, dict[str, Any]]:
    """Fields of features that fire on some tokens of a prompt."""
    ids = tokens(99, 20)
    of = {name: edits(name, kinds.firing(name, ids)) for name in NAMES}
    fields: dict[str, dict[str, Any]] = {name: {"interventions": of[name]} for name in NAMES}
    for name in NAMES:
        fields[f"reconstructed {name}"] = {"interventions": of[name][:1], "error_term": False}
    fields["all kinds"] = {
        "interventions": [item for name in NAMES for item in of[name][:2]],
        "max_share": 0.4,
    }
    when = {"sae": "relu_skip", "feature": of["relu_skip"][0]["feature"], "above": 0.0}
    fields["condition on a transcoder"] = {
        "interventions": [{**of[name][0], "when": when} for name in ("jump", "z", "clt")]
    }
    return {name: field for name, field in fields.items() if name in OF_KINDS}


def _crosscoder(folder: Path, sae: Path) -> str:
    """A weakly causal crosscoder one of whose slots is the SAE in this folder; its source."""
    path = folder / "crosscoder" / f"layer_{'_'.join(map(str, CROSSCODER))}_width_128_l0_small"
    path.mkdir(parents=True)
    w = load_file(sae / "sae_weights.safetensors")
    # Gemma Scope's encoders do not subtract b_dec.
    b_enc = w["b_enc"] - w["b_dec"] @ w["W_enc"]
    for slot in range(len(CROSSCODER)):
        w_dec = torch.stack([w["W_dec"] * (place == slot) for place in range(len(CROSSCODER))], 1)
        tensors = {"w_enc": w["W_enc"], "w_dec": w_dec, "b_enc": b_enc, "b_dec": w["b_dec"],
                   "threshold": w["threshold"]}  # fmt: skip
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path / f"params_layer_{slot}.safetensors")
    point = f"model.layers.{{{','.join(map(str, CROSSCODER))}}}.output"
    said = {"architecture": "jump_relu", "type": "crosscoder"}
    said |= {"hf_hook_point_in": point, "hf_hook_point_out": point}
    (path / "config.json").write_text(json.dumps(said))
    return f"{path},layer={SAES['cross']['layer']}"
