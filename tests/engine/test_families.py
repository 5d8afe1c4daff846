"""Every place of every family that vLLM's CPU build can run, against transformers and hooks.

Families whose layers are arranged as another's are nightly: what can go wrong with one goes wrong
with the other, unless vLLM or transformers changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from sae.card import HOOK_KINDS, HookPoint
from steering.vllm import hook_points
from steering.vllm.unsupported import UnsupportedModelError
from tests.engine.draws import TOLERANCE, difference, drawn, fields, prompts
from tests.engine.engine import SPECIAL_TOKEN_IDS, Engine, tiny_engine
from tests.engine.reference import ReferenceModel, ReferenceSAE
from tests.models import NUM_LAYERS

SPECS_A_FAMILY = 16
LEAST_SPECS = 10
#: Layer of each kind's SAE; hybrid families have attention in odd layers.
LAYER_OF = {
    "hook_resid_pre": 2,
    "hook_resid_mid": 1,
    "hook_resid_post": 1,
    "hook_mlp_out": 2,
    "hook_attn_out": 3,
    "mlp.hook_out": 3,
    "attn.hook_out": 1,
}


@dataclass(frozen=True)
class Family:
    """Where transformers has each place, and why a place is refused.

    Attributes:
        attention, mlp: the modules.
        attention_out, mlp_out: the modules whose outputs are added to the stream, where they are
            others.
        middle: the module that reads the stream between the two.
        refused: by kind of hook point, words of the refusal.
        arguments: of the engine.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_out: str | None = None
    mlp_out: str | None = None
    middle: str = "post_attention_layernorm"
    refused: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, tuple[str, bool]]:
        """As `ReferenceModel` takes them."""
        return {
            "hook_resid_mid": (self.middle, False),
            "hook_attn_out": (self.attention_out or self.attention, True),
            "hook_mlp_out": (self.mlp_out or self.mlp, True),
            "attn.hook_out": (self.attention, True),
            "mlp.hook_out": (self.mlp, True),
        }


_GEMMA = Family(
    attention_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    middle="pre_feedforward_layernorm",
)
_NORM_AFTER = Family(
    attention_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm", middle="mlp"
)
_PARALLEL = Family(refused={"hook_resid_mid": "read the same stream"})
_FACTORS = {"hook_attn_out": "by a factor", "hook_mlp_out": "by a factor"}

FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "mixtral": Family(),
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": Family(),
    "gpt2": Family(attention="attn", middle="ln_2"),
    "gpt_neox": Family(attention="attention", refused=_PARALLEL.refused),
    "gpt_oss": Family(),
    "deepseek_v2": Family(),
    "glm4": Family(attention_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm"),
    "olmo2": _NORM_AFTER,
    "exaone4": _NORM_AFTER,
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    "granite": Family(refused=_FACTORS),
    "granite_hybrid": Family(mlp="shared_mlp", refused=_FACTORS),
    "granite_mamba": Family(mlp="shared_mlp", refused=_FACTORS),
    "stablelm": Family(),
    "falcon_h1": Family(mlp="feed_forward", middle="pre_ff_layernorm"),
}


#: By family, the one whose layers are arranged alike.
ALIKE: Final = {
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "phi3": "llama",
    "qwen3_moe": "mixtral",
    "gemma3": "gemma2",
    "exaone4": "olmo2",
    "cohere2": "cohere",
    "granite_hybrid": "granite_mamba",
}


@dataclass
class Case:
    """A family's engine, serving one SAE at each place that it has, and its reference."""

    family: Family
    engine: Engine
    reference: ReferenceModel
    saes: dict[str, ReferenceSAE]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.nightly] if name in ALIKE else [])
        for name in FAMILIES
    ],
)
def case(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Case]:
    family = FAMILIES[request.param]
    kinds = [kind for kind in HOOK_KINDS if kind in LAYER_OF and kind not in family.refused]
    saes = [
        {
            "architecture": ("jumprelu", "standard")[number % 2],
            "layer": LAYER_OF[kind],
            "hook_kind": kind,
            "seed": number,
            "threshold": 0.2,
        }
        for number, kind in enumerate(kinds)
    ]
    folder = tiny_model(request.param)
    reference = ReferenceModel(folder, SPECIAL_TOKEN_IDS, family.places)
    engine = tiny_engine(
        folder, tmp_path_factory.mktemp("saes"), saes, max_num_seqs=6, **family.arguments
    )
    yield Case(
        family, engine, reference, {name: ReferenceSAE(path) for name, path in engine.saes.items()}
    )
    engine.shut_down()


def test_edits_at_every_place_give_the_log_probabilities_of_transformers(case: Case) -> None:
    specs = drawn(fields(list(case.saes)), SPECS_A_FAMILY)
    texts = prompts(SPECS_A_FAMILY, seed=1)
    found = [
        difference(made, spec, case.reference, case.saes)
        for made, spec in zip(case.engine.generate(texts, specs), specs, strict=True)
    ]
    compared = [value for value in found if value is not None]
    assert len(compared) >= LEAST_SPECS
    assert max(compared) < TOLERANCE, found


def test_reports_at_every_place_give_the_activations_of_transformers(case: Case) -> None:
    features = (3, 40, 77)
    spec = {
        "interventions": [
            {"sae": name, "feature": feature, "op": "cap", "value": 1e5}
            for name in case.saes
            for feature in features
        ],
        "report": True,
    }
    for made in case.engine.generate(prompts(3, seed=2), [spec] * 3):
        seen: dict[str, Tensor] = {}
        case.reference.logprobs(made.prompt, made.tokens, case.saes, spec, seen)
        ids = [*made.prompt, *made.tokens][:-1]
        covered = [t for t, i in enumerate(ids) if t and i not in SPECIAL_TOKEN_IDS]
        for entry in made.steering[0].interventions:
            f = case.saes[entry["sae"]].encode(seen[entry["sae"]])[covered, entry["feature"]]
            assert entry["tokens_edited"] == len(covered)
            assert entry["mean_activation"] == pytest.approx(float(f.mean()), abs=1e-3, rel=1e-3)
            assert entry["max_activation"] == pytest.approx(float(f.max()), abs=1e-3, rel=1e-3)


def test_places_that_a_family_lacks_are_refused_with_the_reason(case: Case) -> None:
    model = case.engine.worker.model_runner.get_model()
    for kind, words in case.family.refused.items():
        point = HookPoint(LAYER_OF[kind], kind)
        with pytest.raises(UnsupportedModelError, match=words):
            hook_points.install(model, point, NUM_LAYERS, 1, torch.float32)
