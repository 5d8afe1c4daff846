"""Transcoders, cross-layer transcoders and SAEs of heads against transformers with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import steering
from sae.card import HookPoint
from sae.errors import SAEError
from sae.sae import open_sae
from sae.source import SAEReference, resolve
from steering.config import SteeringConfig
from steering.request.limits import MAX_GATES, MAX_INTERVENTIONS
from steering.vllm.engine_arguments import engine_arguments
from tests.engine.dictionaries import Dictionary, EditedPass, made, write
from tests.models import D_MODEL, NUM_LAYERS, VOCAB_SIZE, make_tiny_sae

ARGUMENTS: Final[dict[str, Any]] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 * 2**20,
    "distributed_executor_backend": "uni",
}
NUM_NEW: Final = 5
#: Nats.
TOLERANCE: Final = 2e-4
#: In units of an activation.
MARGIN: Final = 1e-5


@dataclass
class Served:
    """An engine with dictionaries of every kind, and the model that they are held against."""

    llm: Any
    model: Any
    dictionaries: dict[str, Dictionary]

    def check(self, field: dict[str, Any], prompt: list[int]) -> tuple[Any, EditedPass]:
        """Log-probabilities agree; the report, and what the reference found."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True, logprobs=0)
        field = {**field, "report": True}
        (output,) = self.llm.generate(
            {"prompt_token_ids": prompt}, params, steering=field, use_tqdm=False
        )
        (choice,) = output.outputs
        ids = [*choice.token_ids]
        found = [step[i].logprob for step, i in zip(choice.logprobs, ids, strict=True)]
        made = EditedPass(self.dictionaries, field, [*prompt, *ids][:-1])
        expected = made.logprobs(self.model)[len(prompt) - 1 :]
        assert made.nearest_jump() > MARGIN, "choose another prompt: rounding decides"
        wanted = expected[range(NUM_NEW), ids].tolist()
        assert found == pytest.approx(wanted, abs=TOLERANCE)
        plain = EditedPass(self.dictionaries, {"interventions": []}, made.ids)
        clean = plain.logprobs(self.model)[len(prompt) - 1 :][range(NUM_NEW), ids]
        assert (clean - torch.tensor(wanted)).abs().max() > 20 * TOLERANCE, "the edit does nothing"
        return output.steering, made

    def firing(self, name: str, prompt: list[int]) -> int:
        """A feature that fires on some tokens of the prompt and not on all."""
        seen = EditedPass(self.dictionaries, {"interventions": []}, prompt)
        seen.logprobs(self.model)
        fires = (seen.f[name][1:] > 0).sum(dim=0)
        return int((fires * (len(prompt) - 1 - fires)).argmax())


def prompt(seed: int, length: int = 14) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(4, VOCAB_SIZE, (length,), generator=rng).tolist()
    return found


def dictionaries_for(scale: dict[str, float]) -> dict[str, Dictionary]:
    """One of each kind; ``scale`` is a typical element of the stream at each kind of place."""
    return {
        "relu_skip": made(1, "mlp.hook_in", D_MODEL, skip=True, seed=1, scale=scale["mlp.hook_in"]),
        "jump": made(2, "ln2.hook_normalized", D_MODEL, seed=2, threshold=0.4),
        "topk": made(1, "hook_resid_mid", D_MODEL, seed=3, k=6, scale=scale["hook_resid_mid"]),
        "own": made(
            2, "mlp.hook_in", D_MODEL, writes="mlp.hook_out", seed=4, scale=scale["mlp.hook_in"]
        ),
        "clt": made(
            1, "hook_resid_mid", D_MODEL, places=NUM_LAYERS - 1, seed=5,
            scale=scale["hook_resid_mid"],
        ),
    }  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def served(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    import transformers

    path = tiny_model(request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    unlike_one(model)
    path = tmp_path_factory.mktemp("model") / request.param
    model.save_pretrained(path)
    for file in tiny_model(request.param).glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    dictionaries = dictionaries_for(scales(model))
    root = tmp_path_factory.mktemp("dictionaries")
    sources = {name: write(root / name, one) for name, one in dictionaries.items()}
    width = model.base_model.layers[2].self_attn.o_proj.in_features
    folder = make_tiny_sae(root / "z", layer=2, hook_kind="attn.hook_z", d_in=width, threshold=0.1)
    sources["z"] = str(folder)
    dictionaries["z"] = of_heads(folder)
    saes = [f"{name}={source}" for name, source in sources.items()]
    llm = steering.SteeringLLM(str(path), saes=saes, **ARGUMENTS)
    yield Served(llm, model, dictionaries)
    llm.llm_engine.engine_core.shutdown()


@torch.no_grad()
def unlike_one(model: Any) -> None:
    """Gains of norms that no two places have in common: what was read before a gain shows."""
    rng = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter += 0.5 * torch.rand(parameter.shape, generator=rng)


def scales(model: Any) -> dict[str, float]:
    probes = {kind: made(1, kind, D_MODEL) for kind in ("hook_resid_mid", "mlp.hook_in")}
    seen = EditedPass(probes, {"interventions": []}, prompt(0))
    seen.logprobs(model)
    return {kind: float(x[1:].square().mean().sqrt()) for kind, x in seen.x.items()}


def of_heads(folder: Path) -> Dictionary:
    """An SAE in SAELens' layout."""
    w: dict[str, Tensor] = load_file(folder / "sae_weights.safetensors")
    return Dictionary(
        2, "attn.hook_z", "attn.hook_z", w["W_enc"].T, w["W_dec"][None], w["b_enc"], w["b_dec"],
        threshold=0.1, b_dec_to_input=True,
    )  # fmt: skip


NAMES: Final = ("relu_skip", "jump", "topk", "own", "clt", "z")


def edits(name: str, feature: int) -> list[dict[str, Any]]:
    return [
        {"sae": name, "feature": feature, "op": "clamp", "value": 4.0},
        {"sae": name, "feature": (feature + 1) % 96, "op": "add", "value": 2.0},
        {"sae": name, "feature": (feature + 2) % 96, "op": "scale", "value": 3.0},
    ]


@pytest.mark.parametrize("name", NAMES)
def test_edits_are_read_where_it_reads_and_added_where_it_writes(served: Served, name: str) -> None:
    ids = prompt(7)
    feature = served.firing(name, ids)
    report, made = served.check({"interventions": edits(name, feature)}, ids)
    for item, entry in zip(edits(name, feature), report["interventions"], strict=True):
        f = made.f[name][1:, item["feature"]]
        assert entry["tokens_edited"] == len(f)
        assert entry["tokens_active"] == int((f > 0).sum())
        assert entry["max_activation"] == pytest.approx(float(f.max()), abs=1e-3)
        assert entry["mean_activation"] == pytest.approx(float(f.mean()), abs=1e-3)
    assert [entry["hook"] for entry in report["edited"]] == sorted(made.shares)
    for entry in report["edited"]:
        share = made.shares[entry["hook"]]
        assert entry["tokens"] == int((~share.isnan()).sum())
        assert entry["mean_share"] == pytest.approx(float(share.nanmean()), rel=1e-3)


@pytest.mark.parametrize("name", ["relu_skip", "jump", "topk", "own", "z"])
def test_without_the_error_term_the_output_is_the_decoded_one(served: Served, name: str) -> None:
    ids = prompt(8)
    items = edits(name, served.firing(name, ids))[:1]
    served.check({"interventions": items, "error_term": False}, ids)


def test_all_kinds_at_once_and_within_a_share_of_what_stands_there(served: Served) -> None:
    ids = prompt(9)
    items = [item for name in NAMES for item in edits(name, served.firing(name, ids))[:2]]
    report, _ = served.check({"interventions": items, "max_share": 0.4}, ids)
    assert any(entry["tokens_limited"] for entry in report["edited"])


def test_a_transcoders_feature_is_a_condition_of_later_edits(served: Served) -> None:
    ids = prompt(10)
    when = {"sae": "relu_skip", "feature": served.firing("relu_skip", ids), "above": 0.0}
    items = [
        {**item, "when": when}
        for name in ("jump", "z", "clt")
        for item in edits(name, served.firing(name, ids))[:1]
    ]
    report, made = served.check({"interventions": items}, ids)
    for i, entry in enumerate(report["interventions"]):
        held = int(made.edited[i].sum())
        assert entry["tokens_edited"] == held
        assert 0 < entry["tokens_held_back"] == len(made.ids) - 1 - held


def test_a_read_is_of_where_the_transcoder_reads(served: Served) -> None:
    from vllm import SamplingParams

    ids = prompt(11)
    for name in ("jump", "topk", "clt", "z"):
        params = SamplingParams(max_tokens=1, temperature=0.0)
        read = {"read": {"sae": name, "top_k": 4}}
        (output,) = served.llm.generate(
            {"prompt_token_ids": ids}, params, steering=read, use_tqdm=False
        )
        seen = EditedPass(served.dictionaries, {"interventions": []}, ids)
        seen.logprobs(served.model)
        tokens = output.steering["read"]["tokens"]
        assert [token["position"] for token in tokens] == list(range(1, len(ids)))
        for token in tokens:
            best = seen.f[name][token["position"]].topk(4).values
            found = [f for _, f in token["features"]]
            assert found == pytest.approx(best[best > 0].tolist(), abs=1e-3)


@pytest.mark.parametrize("name", ["relu_skip", "clt"])
def test_what_reads_elsewhere_cannot_be_reread(served: Served, name: str) -> None:
    items = edits(name, 3)[:1]
    for more in ({"match": "reread"}, {"protect": [{"sae": name, "feature": 5}]}):
        with pytest.raises(ValueError, match="is none of these"):
            served.llm.generate(
                {"prompt_token_ids": prompt(1)}, steering={"interventions": items, **more}
            )


def test_a_cross_layer_transcoder_has_no_reconstruction(served: Served) -> None:
    with pytest.raises(ValueError, match="error_term"):
        served.llm.generate(
            {"prompt_token_ids": prompt(1)},
            steering={"interventions": edits("clt", 3)[:1], "error_term": False},
        )


def test_a_request_of_edits_at_every_place_always_fits(tmp_path: Path) -> None:
    source = write(tmp_path / "clt", made(1, "hook_resid_mid", D_MODEL, places=3))
    reference = resolve(SAEReference.parse(f"clt={source}"))
    config = SteeringConfig((reference,), D_MODEL, NUM_LAYERS, (), max_rows=64)
    handed_down = engine_arguments(config)["additional_config"]["steering"]
    assert handed_down["max_rows"] == 3 * MAX_INTERVENTIONS + MAX_GATES
    places = [f"blocks.{layer}.hook_mlp_out" for layer in (1, 2, 3)]
    assert handed_down["hook_points"] == sorted([*places, "blocks.1.hook_resid_mid"])


def test_what_reads_and_writes_on_two_pipeline_stages_is_refused_at_start(tmp_path: Path) -> None:
    from steering.vllm.worker import _refuse_across_stages

    source = write(tmp_path / "clt", made(1, "hook_resid_mid", D_MODEL, places=3))
    sae = open_sae(SAEReference.parse(f"clt={source}"))
    places = (sae.card.reads, *sae.card.writes)
    every = [HookPoint.parse(hook) for hook in places]
    _refuse_across_stages([sae], every)
    _refuse_across_stages([sae], [])  # on another stage, whole
    for stage in (0, 1):
        owned = [point for point in every if (point.layer >= 2) == bool(stage)]
        with pytest.raises(SAEError, match="on different pipeline stages; serve it without"):
            _refuse_across_stages([sae], owned)


def test_heads_of_another_width_are_told_when_the_model_is_loaded(served: Served) -> None:
    from steering.vllm import hook_points

    worker = served.llm.llm_engine.model_executor.driver_worker.worker
    model, point = worker.model_runner.get_model(), HookPoint.parse("blocks.2.attn.hook_z")
    width = hook_points.width_of_heads(model, point, NUM_LAYERS, 1)
    sae = worker.steering.hooks[str(point)].saes
    assert {one.card.d_in for one in sae.values()} == {width}
    with pytest.raises(SAEError, match=f"but the heads at {point} have {width} elements"):
        worker._refuse_other_heads(
            [SimpleNamespace(card=replace(one.card, d_in=width + 32)) for one in sae.values()],
            [point],
            NUM_LAYERS,
        )
