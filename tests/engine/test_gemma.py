"""Gemma 3 270M with its real weights: vLLM with steering against transformers with hooks.

Its layers are sandwiches, five of six see 512 tokens only, and its stream is long: the norm of an
ordinary token is 1,000 after layer 1 and 36,000 after layer 17, where a random tiny model's is of
the order of 10. The SAEs are random, and scaled to the stream where they sit, so that activations
and distances from a jump are in its units.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.draws import drawn, fields
from tests.engine.engine import Engine, Generated, start
from tests.engine.outputs import count_preemptions
from tests.engine.reference import ReferenceModel, ReferenceSAE, behind_best, margin
from tests.gemma_model import BOS_ID, D_MODEL, NUM_LAYERS, SLIDING_WINDOW
from tests.models import TRAINING_TEXT, make_tiny_sae

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPECIAL_IDS: Final = (0, 1, 2, 3, 4)
SAES: Final[dict[str, dict[str, Any]]] = {
    "a": {"architecture": "jumprelu", "layer": 9},
    "b": {"architecture": "standard", "layer": 5, "hook_kind": "hook_resid_pre"},
    "c": {"architecture": "gated", "layer": 11, "hook_kind": "hook_mlp_out"},
    "d": {"architecture": "jumprelu", "layer": 14, "hook_kind": "hook_attn_out"},
}
#: Nats. The tiny models' is 1e-3 as well; unsteered, 18 layers and 262,144 logits take 1e-4 of it.
TOLERANCE: Final = 1e-3
#: In units of an activation, of which the stream's norm is about 25: 4e-6 of the norm.
MARGIN: Final = 1e-4
SPECS: Final = 48
LEAST_SPECS: Final = 36
SPECS_SHOWN_TO_ACT: Final = 12
BLOCK: Final = 32  # tokens
#: Six for every 32 tokens: layers share them in threes, and three of the 18 see the whole text.
BLOCKS: Final = 150

STRONG: Final = {"interventions": [{"sae": "a", "feature": 7, "op": "clamp", "value": 6.0}]}
OTHER: Final = {"interventions": [{"sae": "c", "feature": 9, "op": "add", "value": 6.0}]}
GENERATION_ONLY: Final = {**STRONG, "positions": {"prompt": False}}


@dataclass
class Served:
    """One engine, what it is held against, and a text to take prompts from."""

    engine: Engine
    model: ReferenceModel
    saes: dict[str, ReferenceSAE]
    text: list[int]  # without <bos>, long enough for two sliding windows

    def prompt(self, start: int, length: int) -> list[int]:
        """`length` tokens of the text after <bos>."""
        return [BOS_ID, *self.text[start : start + length - 1]]

    def expected(
        self, made: Generated, field: Mapping[str, Any] | None, seen: dict[str, Tensor]
    ) -> Tensor:
        """The reference's log-probabilities at the generated tokens."""
        return self.model.logprobs(made.prompt, made.tokens, self.saes, field, seen)

    def difference(self, made: Generated, field: Mapping[str, Any] | None) -> float | None:
        """Largest difference of log-probabilities; None where the spec comes near to a jump."""
        seen: dict[str, Tensor] = {}
        expected = self.expected(made, field, seen)
        if margin(self.saes, seen, field) < MARGIN:
            return None
        assert behind_best(expected, made.tokens) < TOLERANCE, field
        return apart(expected, made)


def apart(expected: Tensor, made: Generated) -> float:
    """Largest difference of the generated tokens' log-probabilities."""
    own = expected[range(len(made.tokens)), made.tokens]
    return float((own - torch.tensor(made.logprobs)).abs().max())


@pytest.fixture(scope="module")
def served(gemma_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An engine whose blocks hold a request of 700 tokens, but not six of 160."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gemma_model)
    text = tokenizer(TRAINING_TEXT, add_special_tokens=False)["input_ids"]
    text = (text * (2 * SLIDING_WINDOW // len(text) + 1))[: 2 * SLIDING_WINDOW]
    model = ReferenceModel(gemma_model, SPECIAL_IDS)
    folder = tmp_path_factory.mktemp("saes")
    folders = {
        name: make_tiny_sae(folder / name, d_in=D_MODEL, seed=i, **kwargs)
        for i, (name, kwargs) in enumerate(SAES.items())
    }
    scale_to_stream(folders, model, [BOS_ID, *text[:100]])
    engine = start(
        gemma_model,
        folders,
        d_model=D_MODEL,
        num_layers=NUM_LAYERS,
        special_token_ids=SPECIAL_IDS,
        max_model_len=768,
        max_num_seqs=6,
        block_size=BLOCK,
        enable_prefix_caching=True,
        num_gpu_blocks_override=BLOCKS,
    )
    saes = {name: ReferenceSAE(path) for name, path in folders.items()}
    yield Served(engine, model, saes, text)
    engine.shut_down()


def scale_to_stream(folders: Mapping[str, Path], model: ReferenceModel, text: list[int]) -> None:
    """Rewrite each SAE as one that reads and writes the stream over its root mean square."""
    seen: dict[str, Tensor] = {}
    unscaled = {name: ReferenceSAE(folder) for name, folder in folders.items()}
    model.logprobs(text, [0], unscaled, None, seen)
    for name, folder in folders.items():
        rms = float(seen[name][1:].norm(dim=-1).median()) / D_MODEL**0.5
        file = folder / "sae_weights.safetensors"
        weights = load_file(file)
        weights["W_enc"] /= rms
        weights["W_dec"] *= rms
        weights["b_dec"] *= rms
        save_file(weights, file)


def test_steered_log_probabilities_agree_with_transformers_and_hooks(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    prompts = [served.prompt(rng.randrange(200), rng.randint(4, 30)) for _ in range(SPECS)]
    for prompt in prompts[::5]:
        prompt[len(prompt) // 2] = 1  # <eos>: special
    specs = drawn(fields(list(served.saes)), SPECS)
    plain = served.engine.generate(prompts[:6], [None] * 6)
    unsteered = max(apart(served.expected(made, None, {}), made) for made in plain)
    assert unsteered < TOLERANCE
    worst = effect = 0.0
    compared = 0
    for made, field in zip(served.engine.generate(prompts, specs), specs, strict=True):
        found = served.difference(made, field)
        if found is None:
            continue
        assert found < TOLERANCE, (found, field)
        worst = max(worst, found)
        compared += 1
        if compared <= SPECS_SHOWN_TO_ACT:
            effect = max(effect, apart(served.expected(made, None, {}), made))
    assert compared >= LEAST_SPECS
    assert effect > 1.0, "the edits of this test do nothing"
    with capsys.disabled():
        print(
            f"\n  Gemma 3 270M, log-probabilities against transformers: unsteered {unsteered:.1e}, "
            f"steered {worst:.1e} over {compared} specs (edits change them by up to {effect:.1f})"
        )


def test_reports_and_reads_are_the_activations_that_transformers_sees(served: Served) -> None:
    for name, sae in served.saes.items():
        field = {
            "interventions": [{"sae": name, "feature": 3, "op": "add", "value": 1.0}],
            "report": True,
            "read": {"sae": name, "top_k": 4},
        }
        [made] = served.engine.generate([served.prompt(40, 30)], [field])
        seen: dict[str, Tensor] = {}
        assert apart(served.expected(made, field, seen), made) < TOLERANCE
        f = sae.encode(seen[name])[1:]  # all but <bos>
        entry = made.steering[0].interventions[0]
        assert entry["tokens_edited"] == len(f)
        assert entry["tokens_active"] == int((f[:, 3] > 0).sum())
        assert entry["mean_activation"] == pytest.approx(float(f[:, 3].mean()), abs=1e-4)
        assert entry["max_activation"] == pytest.approx(float(f[:, 3].max()), abs=1e-4)
        read = made.steering[0].read["tokens"]
        assert [token["position"] for token in read] == list(range(1, len(f) + 1))
        for token, expected in zip(read, f, strict=True):
            strongest = expected.topk(4).values
            found = [activation for _, activation in token["features"]]
            assert found == pytest.approx(strongest[strongest > 0].tolist(), abs=1e-4)
            assert found == pytest.approx(
                [float(expected[feature]) for feature, _ in token["features"]], abs=1e-4
            )


def test_a_prompt_longer_than_the_sliding_window_is_steered_in_all_layers(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = served.prompt(0, SLIDING_WINDOW + 150)
    early = {**STRONG, "positions": {"end": 100}}  # outside of the last token's window
    made = served.engine.generate([prompt] * 2, [None, early])
    assert apart(served.expected(made[0], None, {}), made[0]) < TOLERANCE
    assert apart(served.expected(made[1], early, {}), made[1]) < TOLERANCE
    assert apart(served.expected(made[1], None, {}), made[1]) > 10 * TOLERANCE
    monkeypatch.setattr(served.model.model.config, "sliding_window", 4 * SLIDING_WINDOW)
    assert apart(served.expected(made[1], early, {}), made[1]) > 10 * TOLERANCE


def test_prefix_blocks_are_shared_by_equal_steering_only(served: Served) -> None:
    prompt = served.prompt(300, 4 * BLOCK + 4)
    fields = [STRONG, None, OTHER, GENERATION_ONLY, STRONG, None]
    cached = []
    for field in fields:
        [made] = served.engine.generate([prompt], [field])
        assert apart(served.expected(made, field, {}), made) < TOLERANCE
        cached.append(made.cached)
    assert cached == [0, 0, 0, 0, 4 * BLOCK, 4 * BLOCK]


def test_preempted_requests_are_steered_as_if_they_had_not_been(served: Served) -> None:
    preempted = count_preemptions(served.engine)
    prompts = [served.prompt(17 * i, 100 + i) for i in range(6)]
    specs: list[Any] = [STRONG, GENERATION_ONLY, OTHER, None, STRONG, OTHER]
    reporting = [None if field is None else {**field, "report": True} for field in specs]
    made = served.engine.generate(prompts, reporting, max_tokens=60)
    assert preempted() > 0
    for field, each in zip(specs, made, strict=True):
        assert apart(served.expected(each, field, {}), each) < TOLERANCE
        if field is not None:
            own = 59 if field is GENERATION_ONLY else len(each.prompt) + 58
            special = sum(token in SPECIAL_IDS for token in each.tokens[:-1])
            assert each.steering[0].interventions[0]["tokens_edited"] == own - special
