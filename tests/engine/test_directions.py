"""A control vector of GGUF against Hugging Face's model with a hook that does the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import steering
from tests.engine.offline_arguments import ARGUMENTS
from tests.engine.outputs import tokens
from tests.models import D_MODEL
from tests.sae.control_vectors import write_gguf

NUM_NEW = 6
EVERYWHERE = {"special_tokens": True}


@pytest.fixture(scope="module")
def vectors() -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {layer: torch.randn(D_MODEL, generator=generator) for layer in (1, 2)}


@pytest.fixture(scope="module")
def llm(
    tiny_model: Callable[[str], Path],
    vectors: dict[int, Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    path = write_gguf(tmp_path_factory.mktemp("vectors") / "calm.gguf", vectors)
    made = steering.SteeringLLM(
        str(tiny_model("llama")), saes=[f"calm={path},layer=all"], **ARGUMENTS
    )
    yield made
    made.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def reference(tiny_model: Callable[[str], Path]) -> Any:
    import transformers

    path = str(tiny_model("llama"))
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def answered(model: Any, ids: list[int], edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Any:
    """Greedy tokens and their log-probabilities, each layer's output edited at every token."""

    def hook(edit: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def edited(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            return edit(output)

        return edited

    handles = [
        model.model.layers[layer].register_forward_hook(hook(edit)) for layer, edit in edits.items()
    ]
    try:
        sequence, scores = list(ids), []
        for _ in range(NUM_NEW):
            found = model(torch.tensor([sequence])).logits[0, -1].log_softmax(-1)
            sequence.append(int(found.argmax()))
            scores.append(float(found.max()))
    finally:
        for handle in handles:
            handle.remove()
    return sequence[len(ids) :], scores


def generated(llm: Any, ids: list[int], interventions: list[dict[str, Any]]) -> Any:
    from vllm import SamplingParams

    field = {"interventions": interventions, "positions": EVERYWHERE} if interventions else None
    params = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True, logprobs=0)
    (output,) = llm.generate({"prompt_token_ids": ids}, params, steering=field, use_tqdm=False)
    (choice,) = output.outputs
    ids_out = [*choice.token_ids]
    return ids_out, [step[i].logprob for step, i in zip(choice.logprobs, ids_out, strict=True)]


def assert_same(found: Any, wanted: Any) -> None:
    assert found[0] == wanted[0]
    assert found[1] == pytest.approx(wanted[1], abs=1e-4)


@pytest.mark.parametrize("layers", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("times", [1.0, -0.5])
def test_adding_its_maximum_is_adding_the_vector_to_the_block_s_output(
    llm: Any, reference: Any, vectors: dict[int, Tensor], layers: tuple[int, ...], times: float
) -> None:
    ids = tokens(7, 12)
    edits = [
        {"sae": f"calm.{layer}", "feature": 0, "op": "add", "value": times, "unit": "max_act"}
        for layer in layers
    ]
    added = {layer: partial(torch.add, alpha=times, other=vectors[layer]) for layer in layers}
    assert_same(generated(llm, ids, edits), answered(reference, ids, added))
    assert generated(llm, ids, edits) != generated(llm, ids, [])


def test_ablating_takes_the_direction_out_of_the_stream(
    llm: Any, reference: Any, vectors: dict[int, Tensor]
) -> None:
    ids, v = tokens(8, 12), vectors[1]
    edits = [{"sae": "calm.1", "feature": 0, "op": "ablate"}]
    out = {1: lambda x: x - (x @ v)[..., None] * v / (v @ v)}
    assert_same(generated(llm, ids, edits), answered(reference, ids, out))


def test_report_and_read_show_a_projection_of_either_sign(llm: Any) -> None:
    from vllm import SamplingParams

    field = {
        "interventions": [{"sae": "calm.1", "feature": 0, "op": "cap", "value": 1e6}],
        "positions": {"generation": False},
        "report": True,
        "read": {"sae": "calm.2", "top_k": 5},
    }
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    (output,) = llm.generate(
        {"prompt_token_ids": tokens(9, 24)}, params, steering=field, use_tqdm=False
    )
    (entry,) = output.steering["interventions"]
    assert 0 < entry["tokens_active"] < entry["tokens_edited"] == 23
    read = output.steering["read"]["tokens"]
    # A dictionary of one feature: listed where it is above 0.
    assert {len(token["features"]) for token in read} == {0, 1}
    assert all(f > 0 for token in read for _, f in token["features"])


def test_reconstruction_is_not_defined(llm: Any) -> None:
    edits = [{"sae": "calm.1", "feature": 0, "op": "ablate"}]
    with pytest.raises(ValueError, match="error_term"):
        llm.generate(
            {"prompt_token_ids": tokens(9, 4)},
            steering={"interventions": edits, "error_term": False},
            use_tqdm=False,
        )


def test_cards_say_what_they_are(llm: Any) -> None:
    card = llm.catalog.card("calm.2").to_json()
    assert (card["kind"], card["architecture"], card["d_sae"]) == ("direction", "direction", 1)
    assert card["hook"] == card["reads"] == "blocks.2.hook_resid_post"
    assert card["has_max_activations"]
    assert card["error_term"] is False
