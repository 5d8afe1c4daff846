"""Conditions, edits solved to be read again, protected features and limits, on a real engine."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from steering.vllm.results import results_of
from tests.engine.engine import SPECIAL_TOKEN_IDS, Engine, Generated, start
from tests.engine.outputs import count_preemptions, tokens
from tests.engine.reference import ReferenceModel, ReferenceSAE, behind_best
from tests.models import D_MODEL, NUM_LAYERS, make_tiny_model, make_tiny_sae, resemble

D_SAE: Final = 128
SINK_NORM: Final = 60.0
TOLERANCE: Final = 1e-3
#: Specs that come nearer than this to a jump, a threshold or a limit are left out.
MARGIN: Final = 2e-4
SPECS: Final = 72
MOST_CONDITIONS: Final = 8
#: Nothing reaches it, everything stays below it.
FAR: Final = 1e5

#: In the order of the pass; `again` has the weights of `b` and reads what is left of its edits.
SAES: Final[dict[str, dict[str, Any]]] = {
    "a": {"architecture": "jumprelu", "layer": 1},
    "b": {"architecture": "standard", "layer": 2, "seed": 1},
    "gate": {"architecture": "topk", "layer": 2, "seed": 2, "k": 16},
    "again": {"architecture": "standard", "layer": 3, "hook_kind": "hook_resid_pre", "seed": 1},
}
#: How late in the pass each is read.
PLACE: Final = {"a": 0, "b": 1, "gate": 1, "again": 2}
OPS: Final = ("clamp", "ablate", "scale", "add", "floor", "cap")


def make_saes(folder: Path) -> dict[str, Path]:
    """SAEs whose decoder rows resemble their encoder rows, as those of trained ones do."""
    features = [{"index": i, "max_activation": 1.0 + i / D_SAE} for i in range(D_SAE)]
    paths = {
        name: make_tiny_sae(folder / name, d_sae=D_SAE, features=features, **kwargs)
        for name, kwargs in SAES.items()
    }
    for path in paths.values():
        resemble(path)
    return paths


def engine_on(model: Path, saes: dict[str, Path], **arguments: Any) -> Engine:
    return start(
        model,
        saes,
        d_model=D_MODEL,
        num_layers=NUM_LAYERS,
        special_token_ids=SPECIAL_TOKEN_IDS,
        sink_norm=SINK_NORM,
        **arguments,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_saes(tmp_path_factory.mktemp("saes"))


@pytest.fixture(scope="module")
def engine(model: Path, saes: dict[str, Path]) -> Iterator[Engine]:
    made = engine_on(model, saes, max_num_seqs=6)
    yield made
    made.shut_down()


class Oracle:
    """The reference with these SAEs."""

    def __init__(self, model: Path, saes: dict[str, Path]) -> None:
        self.model = ReferenceModel(model, SPECIAL_TOKEN_IDS)
        self.saes = {name: ReferenceSAE(path, SINK_NORM) for name, path in saes.items()}

    def agrees(self, made: Generated, field: dict[str, Any], report: Any = None) -> bool:
        """Compare log-probabilities and the report; False where rounding decides."""
        expected, trace = self.model.trace(made.prompt, made.tokens, self.saes, field)
        jumps = [
            float(self.saes[name].distance_to_jump(trace.seen[name], features).min())
            for name, features in self._edited(field).items()
        ]
        if min(trace.nearest, *jumps) < MARGIN:
            return False
        assert behind_best(expected, made.tokens) < TOLERANCE or report is not None, field
        found = max(
            abs(float(expected[i, t]) - logprob)
            for i, (t, logprob) in enumerate(zip(made.tokens, made.logprobs, strict=True))
        )
        assert found < TOLERANCE, (found, field)
        report = made.steering[0] if report is None else report
        entries, edited = trace.report()
        for entry, ours in zip(report.interventions, entries, strict=True):
            assert entry.keys() == {*STATED, *ours}, field
            assert {k: entry[k] for k in ours} == _approximately(ours), field
        assert report.edited == [_approximately(one) for one in edited], field
        return True

    def _edited(self, field: dict[str, Any]) -> dict[str, list[int] | None]:
        found: dict[str, list[int] | None] = {}
        for item in field["interventions"]:
            found.setdefault(item["sae"], []).append(item["feature"])  # type: ignore[union-attr]
        return found if field.get("error_term", True) else dict.fromkeys(found)


STATED: Final = ("sae", "feature", "op", "value", "effective_value")


def _approximately(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        k: pytest.approx(v, rel=1e-3, abs=1e-3) if isinstance(v, float) else v
        for k, v in figures.items()
    }


@pytest.fixture(scope="module")
def oracle(model: Path, saes: dict[str, Path]) -> Oracle:
    return Oracle(model, saes)


class Specs:
    """Random fields, the same in every run."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def field(self) -> dict[str, Any]:
        """With no more conditions than a request may have."""
        field = self._field()
        while json.dumps(field).count("above") + json.dumps(field).count("below") > MOST_CONDITIONS:
            field = self._field()
        return field

    def _field(self) -> dict[str, Any]:
        rng = self.random
        mode = rng.choice(["delta", "delta", "reread", "reread", "reconstruct"])
        edited = rng.choice([["a"], ["b"], ["again"], ["a", "b"], ["b", "again"], ["a", "again"]])
        protects = mode != "reconstruct" and rng.random() < 0.4
        if mode == "delta" and not protects and rng.random() < 0.3:
            edited = [*edited, "gate"]
        field: dict[str, Any] = {"report": True, "positions": self.positions()}
        if mode == "reread":
            field["match"] = "reread"
        if mode == "reconstruct":
            edited, field["error_term"] = edited[:1], False
        if rng.random() < 0.3:
            field["max_share"] = rng.choice([0.05, 0.2, 0.6])
        if rng.random() < 0.6:
            prompt = rng.random() < 0.4
            field["when"] = self.when(min(edited, key=PLACE.__getitem__), prompt)
            if prompt:
                field["positions"] = {"prompt": False}
        features = rng.sample(range(D_SAE), 9)
        field["interventions"] = [
            self.edit(name, features.pop(), own=mode == "delta", field=field)
            for name in edited
            for _ in range(rng.randint(1, 3))
        ][:6]
        if protects:
            names = {item["sae"] for item in field["interventions"]}
            field["protect"] = [
                {"sae": rng.choice(sorted(names)), "feature": features.pop()}
                for _ in range(rng.randint(1, 3))
            ]
        return field

    def edit(self, name: str, feature: int, own: bool, field: dict[str, Any]) -> dict[str, Any]:
        rng = self.random
        item: dict[str, Any] = {"sae": name, "feature": feature, "op": rng.choice(OPS)}
        if item["op"] != "ablate":
            item["value"] = rng.choice([-2.0, 0.0, 0.5, 1.5, 4.0])
        if own and rng.random() < 0.5:
            item["when"] = self.when(name, prompt=False)
        elif own and rng.random() < 0.2 and "when" in field:
            item["when"] = "always"
        if own and rng.random() < 0.5 and not field["positions"]:
            item["positions"] = self.positions()
        return item

    def positions(self) -> dict[str, Any]:
        return self.random.choice(
            [
                *({}, {}, {"special_tokens": True}, {"prompt": False}, {"generation": False}),
                *({"start": -4}, {"end": -2}, {"start": -9, "end": -1}, {"start": 2, "end": -3}),
                *({"start": -60, "end": 12}, {"start": -3, "prompt": False}),
            ]
        )

    def when(self, name: str, prompt: bool) -> Any:
        """Conditions that are known where an SAE's edit is made; of the whole prompt or not."""
        rng = self.random
        conditions = [self.condition(name, prompt) for _ in range(rng.randint(1, 3))]
        return rng.choice([conditions[0], conditions, {"any": conditions}])

    def condition(self, name: str, prompt: bool) -> dict[str, Any]:
        rng = self.random
        scope = "prompt" if prompt else rng.choice([None, "token", "so_far"])
        known = [n for n, place in PLACE.items() if prompt or place <= PLACE[name]]
        made: dict[str, Any] = {"sae": rng.choice(known), "feature": rng.randrange(D_SAE)}
        bounds = [0, 0.5, 1.0] if scope in (None, "token") else [1.0, 1.5, 2.5]
        made[rng.choice(["above", "below"])] = rng.choice(bounds)
        if scope is not None:
            made["scope"] = scope
        if rng.random() < 0.3:
            made["unit"] = "max_act"
        return made


def test_conditions_and_solved_edits_agree_with_transformers_and_hooks(
    engine: Engine, oracle: Oracle
) -> None:
    draw = Specs(seed=3)
    fields = [draw.field() for _ in range(SPECS)]
    texts = [tokens(i, 5 + 3 * (i % 9)) for i in range(SPECS)]
    made = engine.generate(texts, fields)
    compared = [
        field
        for one, field in zip(made, fields, strict=True)
        if oracle.agrees(one, {**field, "interventions": field["interventions"]})
    ]
    assert len(compared) > 0.7 * SPECS
    told = [one.steering[0] for one in made]
    entries = [entry for report in told for entry in report.interventions]
    for kind in (True, False):  # conditions held somewhere, and did not somewhere
        assert any(bool(e["tokens_held_back"]) == kind for e in entries if "tokens_held_back" in e)
    assert any(e.get("tokens_held_back") and e["tokens_edited"] for e in entries)
    assert any(e["tokens_limited"] for report in told for e in report.edited)
    assert {one["hook"] for report in told for one in report.edited} == {
        "blocks.1.hook_resid_post",
        "blocks.2.hook_resid_post",
        "blocks.3.hook_resid_pre",
    }


EDIT: Final = {"sae": "b", "feature": 7, "op": "clamp", "value": 6.0}
WAYS: Final[dict[str, dict[str, Any]]] = {
    "delta": {"interventions": [EDIT, {"sae": "a", "feature": 9, "op": "scale", "value": 3}]},
    "reread": {"interventions": [EDIT], "match": "reread"},
    "protect": {"interventions": [EDIT], "protect": [{"sae": "b", "feature": 8}]},
    "limit": {"interventions": [EDIT], "max_share": 0.1},
    "reconstruct": {"interventions": [EDIT], "error_term": False},
    "topk": {"interventions": [{**EDIT, "sae": "gate"}]},
}
GENERATION: Final = {"positions": {"prompt": False}}
NEVER: Final[list[Any]] = [
    {"sae": "a", "feature": 3, "above": FAR},
    [{"sae": "a", "feature": 3, "above": FAR}, {"sae": "a", "feature": 4, "below": FAR}],
    {"sae": "a", "feature": 3, "above": FAR, "scope": "so_far"},
    {"sae": "again", "feature": 3, "above": FAR, "scope": "prompt"},
    {"sae": "gate", "feature": 3, "above": FAR, "scope": "prompt"},
]
ALWAYS: Final[list[Any]] = [
    {"sae": "a", "feature": 3, "below": FAR},
    {"any": [{"sae": "a", "feature": 3, "above": FAR}, {"sae": "a", "feature": 4, "below": FAR}]},
    {"sae": "a", "feature": 3, "below": FAR, "scope": "so_far"},
    {"sae": "again", "feature": 3, "below": FAR, "scope": "prompt"},
    {"sae": "gate", "feature": 3, "below": FAR, "scope": "prompt"},
]


def alone(engine: Engine, prompt: Sequence[int], field: dict[str, Any] | None) -> Generated:
    """Its own batch, and nothing from the prefix cache."""
    sampling: dict[str, Any] = {"skip_reading_prefix_cache": True}
    [made] = engine.generate([prompt], [field], max_tokens=6, **sampling)
    return made


@pytest.mark.parametrize("way", WAYS)
def test_condition_that_holds_nowhere_or_everywhere_changes_not_one_bit(
    engine: Engine, way: str
) -> None:
    prompt = tokens(900, 20)
    for never, always in zip(NEVER, ALWAYS, strict=True):
        of_prompt = isinstance(never, dict) and never.get("scope") == "prompt"
        field = {**WAYS[way], **(GENERATION if of_prompt else {})}
        clean = alone(engine, prompt, None)
        steered = alone(engine, prompt, field)
        assert clean.logprobs != steered.logprobs
        nowhere = alone(engine, prompt, {**field, "when": never})
        everywhere = alone(engine, prompt, {**field, "when": always})
        assert (nowhere.tokens, nowhere.logprobs) == (clean.tokens, clean.logprobs), never
        assert (everywhere.tokens, everywhere.logprobs) == (steered.tokens, steered.logprobs)


def test_edit_solved_to_be_read_again_is_read_and_protected_features_stay(engine: Engine) -> None:
    prompt = tokens(910, 24)
    ablated, clamped, guarded = 20, 21, [22, 23, 24, 25]

    def read_again(*edits: dict[str, Any], **more: Any) -> dict[int, tuple[float, float]]:
        """The mean and largest activation of each on what the edits at `b` left of the stream."""
        probes = [
            {"sae": "again", "feature": i, "op": "add", "value": 0}
            for i in (ablated, clamped, *guarded)
        ]
        field = {
            "interventions": [*edits, *probes],
            "positions": {"generation": False},
            "report": True,
            **more,
        }
        [report] = alone(engine, prompt, field).steering
        assert report.interventions[-1]["tokens_edited"] == len(prompt) - 1
        return {
            entry["feature"]: (entry["mean_activation"], entry["max_activation"])
            for entry in report.interventions
            if entry["sae"] == "again"
        }

    edits = [
        {"sae": "b", "feature": ablated, "op": "ablate"},
        {"sae": "b", "feature": clamped, "op": "clamp", "value": 9.0},
    ]
    before, plain = read_again(), read_again(*edits)
    assert all(largest > 0.1 for _, largest in before.values())
    assert plain[clamped][1] > 9.1
    for protect in ([], [{"sae": "b", "feature": i} for i in guarded]):
        after = read_again(*edits, match="reread", **({"protect": protect} if protect else {}))
        assert after[ablated] == pytest.approx((0, 0), abs=1e-5)
        assert after[clamped] == pytest.approx((9, 9), abs=1e-4)
        stays = [after[i] == pytest.approx(before[i], abs=1e-4) for i in guarded]
        assert all(stays) if protect else not any(stays)


SO_FAR: Final = {"sae": "a", "feature": 3, "above": 1.0, "scope": "so_far"}
CONDITIONED: Final[list[dict[str, Any]]] = [
    {"interventions": [EDIT], "when": {**SO_FAR, "sae": "again", "scope": "prompt"}, **GENERATION},
    {"interventions": [{**EDIT, "op": "add"}], "when": SO_FAR, "match": "reread"},
    {"interventions": [EDIT], "when": {"sae": "gate", "feature": 3, "below": 0.5}},
    {"interventions": [EDIT], "when": {"any": [SO_FAR, {"sae": "b", "feature": 5, "above": 0}]}},
]


def test_prompt_that_decides_is_computed_and_any_other_is_shared(engine: Engine) -> None:
    prompt = tokens(930, 140)  # a block is of 128
    for field in CONDITIONED:
        decides = "so_far" in json.dumps(field) or '"prompt"' in json.dumps(field["when"])
        first, again = (engine.generate([prompt], [field])[0] for _ in range(2))
        assert (first.cached, again.cached) == (0, 0 if decides else 128)
        assert again.tokens == first.tokens
        assert again.logprobs == pytest.approx(first.logprobs, abs=2e-4)
    other = {**CONDITIONED[2], "when": {**CONDITIONED[2]["when"], "below": 0.6}}
    assert engine.generate([prompt], [other])[0].cached == 0


def test_each_choice_has_conditions_and_figures_of_its_own(engine: Engine, oracle: Oracle) -> None:
    from vllm import SamplingParams

    field = {**CONDITIONED[3], "report": True, "max_share": 0.5}
    field["protect"] = [{"sae": "b", "feature": 8}]
    prompt = tokens(940, 12)
    params = SamplingParams(
        n=3,
        seed=5,
        temperature=1.0,
        max_tokens=24,
        logprobs=1,
        ignore_eos=True,
        detokenize=False,
        extra_args={"steering": field},
    )
    [output] = engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    reports = results_of(engine.llm, output, params)
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 3
    agreed = 0
    for choice, report in zip(output.outputs, reports, strict=True):
        ids = list(choice.token_ids)
        logprobs = [entry[t].logprob for entry, t in zip(choice.logprobs, ids, strict=True)]
        agreed += oracle.agrees(Generated(prompt, ids, logprobs, 0), field, report)
        assert report.to_json(True)["protected"].keys() == {"norm_kept", "gain_kept"}
    assert agreed >= 2


def test_chunks_and_preemption_change_no_condition(
    model: Path, saes: dict[str, Path], oracle: Oracle
) -> None:
    # The last: an engine that ends takes what others in this process need along.
    cramped = engine_on(
        model,
        saes,
        block_size=32,
        max_num_seqs=4,
        max_num_batched_tokens=11,
        num_gpu_blocks_override=10,
        max_model_len=128,
    )
    try:
        preempted = count_preemptions(cramped)
        prompts = [tokens(920 + i, 40) for i in range(8)]
        fields = [{**field, "report": True} for field in CONDITIONED] * 2
        made = cramped.generate(prompts, fields, max_tokens=60)
        assert preempted() > 0
        agreed = [oracle.agrees(*both) for both in zip(made, fields, strict=True)]
        assert sum(agreed) >= 5
    finally:
        cramped.shut_down()
