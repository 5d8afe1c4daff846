"""Transcoders, cross-layer transcoders and SAEs of heads against transformers with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch

import steering
from sae.card import HookPoint
from sae.errors import SAEError
from sae.sae import open_sae
from sae.source import SAEReference, resolve
from steering.config import SteeringConfig
from steering.request.limits import MAX_GATES, MAX_INTERVENTIONS
from steering.vllm.engine_arguments import engine_arguments
from tests.engine.dictionaries import D_SAE, EditedPass, made, write
from tests.engine.kinds import NAMES, Kinds, edits, every_kind, prompt
from tests.models import D_MODEL, NUM_LAYERS, VOCAB_SIZE

ARGUMENTS: Final[dict[str, Any]] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "block_size": 32,
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
    kinds: Kinds

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
        made, expected = self.kinds.run(field, [*prompt, *ids][:-1])
        assert made.nearest_jump() > MARGIN, "choose another prompt: rounding decides"
        wanted = expected[len(prompt) - 1 :][range(NUM_NEW), ids].tolist()
        assert found == pytest.approx(wanted, abs=TOLERANCE)
        _, plain = self.kinds.run({"interventions": []}, [*made.ids])
        clean = plain[len(prompt) - 1 :][range(NUM_NEW), ids]
        assert (clean - torch.tensor(wanted)).abs().max() > 20 * TOLERANCE, "the edit does nothing"
        return output.steering, made


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def served(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    kinds = every_kind(tiny_model(request.param), tmp_path_factory.mktemp("kinds"))
    saes = [f"{name}={source}" for name, source in kinds.sources.items()]
    llm = steering.SteeringLLM(str(kinds.checkpoint), saes=saes, **ARGUMENTS)
    yield Served(llm, kinds)
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("name", NAMES)
def test_edits_are_read_where_it_reads_and_added_where_it_writes(served: Served, name: str) -> None:
    ids = prompt(7)
    feature = served.kinds.firing(name, ids)
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
    items = edits(name, served.kinds.firing(name, ids))[:1]
    served.check({"interventions": items, "error_term": False}, ids)


def test_all_kinds_at_once_and_within_a_share_of_what_stands_there(served: Served) -> None:
    ids = prompt(9)
    items = [item for name in NAMES for item in edits(name, served.kinds.firing(name, ids))[:2]]
    report, _ = served.check({"interventions": items, "max_share": 0.4}, ids)
    assert any(entry["tokens_limited"] for entry in report["edited"])


@pytest.mark.parametrize("name", ["topk", "clt", "z"])
def test_prefix_blocks_are_shared_by_equal_edits_only(served: Served, name: str) -> None:
    ids = prompt(20, length=70)
    feature = served.kinds.firing(name, ids)
    cached = []
    for first in (feature, feature, feature + 1):
        field = {"interventions": edits(name, first % D_SAE)[:2]}
        report, _ = served.check(field, ids)
        cached.append(report["tokens_cached"])
    assert cached == [0, 64, 0]


def test_a_transcoders_feature_is_a_condition_of_later_edits(served: Served) -> None:
    ids = prompt(10)
    when = {"sae": "relu_skip", "feature": served.kinds.firing("relu_skip", ids), "above": 0.0}
    items = [
        {**item, "when": when}
        for name in ("jump", "z", "clt")
        for item in edits(name, served.kinds.firing(name, ids))[:1]
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
        seen, _ = served.kinds.run({"interventions": []}, ids)
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


@pytest.mark.parametrize("name", NAMES)
def test_what_studies_say_of_every_kind_is_what_transformers_does(
    served: Served, name: str
) -> None:
    ids, one, llm = prompt(12), served.kinds.dictionaries[name], served.llm
    feature = served.kinds.firing(name, ids)
    edit = {"sae": name, "feature": feature, "op": "add", "value": 3.0}
    start, entered = 6, ids[:-1]  # a completion's last token is scored, and never enters
    text = {"prompt": ids[:start], "completion": ids[start:]}
    seen, plain = served.kinds.run({"interventions": []}, entered)
    _, added = served.kinds.run({"interventions": [edit]}, entered)
    f = seen.f[name][1:, feature]

    evaluated = llm.evaluate(
        {
            "texts": [text],
            "configurations": [{"name": "x", "steering": {"interventions": [edit]}}],
            "features": [{"sae": name}],
        }
    )["configurations"][0]
    kl = (plain.exp() * (plain - added)).sum(dim=-1)[start - 1 :]
    assert evaluated["kl"]["mean"] == pytest.approx(float(kl.mean()), abs=TOLERANCE)
    (figures,) = evaluated["features"]
    (moved,) = figures["edited"]
    assert moved["before"] == pytest.approx(float(f.mean()), abs=1e-3)
    # What is written elsewhere is not read again; of heads it is.
    assert (figures["explained"] is None) == (name != "z")
    assert (abs(moved["after"] - moved["before"]) < 1e-4) == (name != "z")

    clamped = {"interventions": [{**edit, "op": "clamp", "value": 0.0}]}
    _, without = served.kinds.run(clamped, entered)
    at = range(start - 1, len(entered)), ids[start:]
    (lost,) = llm.attribute(name, {**text, "candidates": [feature]})["features"]
    assert lost["effect"] == pytest.approx(
        float((plain - without)[at].sum()), abs=NUM_NEW * TOLERANCE
    )
    assert lost["activation"] == pytest.approx(float(f.max()), abs=1e-3)

    how = {"op": "add", "value": 3.0, "unit": "raw"}
    body = {"prompt": entered, "features": [feature], "edit": how}
    (ranked,) = llm.rank(name, body)["features"]
    promoted = served.kinds.promoted(one, feature, 20)
    strictly = (added[-1] > added[-1][promoted][:, None]).sum(dim=-1)
    score = (1 - int(strictly.min()) / VOCAB_SIZE) * float(added[-1][promoted].max().exp())
    assert ranked["kl"] == pytest.approx(float(kl[-1]), abs=TOLERANCE)
    assert ranked["output_score"] == pytest.approx(score, abs=TOLERANCE)

    (told,) = llm.forecast({"steering": {"interventions": [edit]}})["edits"]
    assert told["norm"] == pytest.approx(3.0 * float(one.W_dec[:, feature].sum(dim=0).norm()))
    gain = float(one.W_enc[feature] @ one.W_dec[0, feature])
    assert told["self_gain"] == pytest.approx(gain, abs=1e-5)

    sides = {"positive": [{"prompt": entered}], "negative": [{"prompt": prompt(13)}]}
    found = llm.contrast(name, {**sides, "top_k": 200})
    contrasted = [one for side in found.values() for one in side if one["feature"] == feature]
    assert [one["mean_positive"] for one in contrasted] == [
        pytest.approx(float(f.mean()), abs=1e-3)
    ]


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
    (card,) = (one.card for one in sae.values())
    writes = replace(card, reads="blocks.2.hook_resid_pre", d_in=D_MODEL)
    worker._refuse_other_heads([SimpleNamespace(card=writes)], [point], NUM_LAYERS)
    for name, other in (
        ("d_in", replace(card, d_in=width + 32)),
        ("d_out", replace(writes, d_out=width + 32)),
    ):
        refusal = f"{name} is {width + 32}, but the heads at {point} have {width} elements"
        with pytest.raises(SAEError, match=refusal):
            worker._refuse_other_heads([SimpleNamespace(card=other)], [point], NUM_LAYERS)
