"""Each trap that steering inside a serving engine can fall into, on a real engine.

Steered results are compared with the same request alone, or with an engine without steering.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from steering.vllm.door import catalog_for
from tests.engine.engine import SPECIAL_TOKEN_IDS, Engine
from tests.engine.outputs import (
    GENERATION_ONLY,
    OTHER,
    PROMPT_ONLY,
    STRONG,
    count_preemptions,
    edited,
    generated,
    ordinary,
    reporting,
    same,
    tokens,
)

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(shared_engine: MakeEngine) -> MakeEngine:
    """Engines by configuration, each with whatever the tests before have left in its slots."""
    return shared_engine


# Prefix cache


def test_blocks_of_a_steered_request_are_never_served_to_a_clean_one(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(block_size=32, enable_prefix_caching=True)
    prompt = tokens(0, 100)
    fresh = make_engine(block_size=32, enable_prefix_caching=False)
    [clean] = fresh.generate([prompt], [None])
    engine.generate([prompt], [STRONG])
    [after] = engine.generate([prompt], [None])
    assert after.cached == 0
    assert same(after, clean)


def test_equal_steering_shares_blocks_and_different_steering_does_not(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(block_size=32, enable_prefix_caching=True)
    prompt = tokens(1, 100)
    [first] = engine.generate([prompt], [STRONG])
    [other] = engine.generate([prompt], [OTHER])
    [again] = engine.generate(
        [prompt],
        [
            {
                "interventions": [{"op": "clamp", "sae": "a", "value": 8, "feature": 7}],
                "report": True,
            }
        ],
    )
    assert other.cached == 0
    assert again.cached == 96
    assert same(again, first)
    assert again.steering[0].tokens_cached == again.cached
    assert edited(again) == len(prompt) + generated(again) - again.cached


def test_a_generated_turn_is_not_taken_for_a_prompt_of_the_next_one(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(block_size=32, enable_prefix_caching=True)
    fresh = make_engine(block_size=32, enable_prefix_caching=False)
    prompt = tokens(2, 40)
    [turn] = engine.generate([prompt], [GENERATION_ONLY], max_tokens=40)
    longer = [*prompt, *turn.tokens, *tokens(3, 8)]
    [second] = engine.generate([longer], [GENERATION_ONLY])
    [expected] = fresh.generate([longer], [GENERATION_ONLY])
    assert second.cached == 0
    assert same(second, expected)


def test_a_turn_steered_alike_in_both_phases_is_shared_with_the_next_one(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(block_size=32, enable_prefix_caching=True)
    fresh = make_engine(block_size=32, enable_prefix_caching=False)
    prompt = tokens(2, 40)
    [turn] = engine.generate([prompt], [STRONG], max_tokens=40)
    longer = [*prompt, *turn.tokens, *tokens(3, 8)]
    [second] = engine.generate([longer], [STRONG])
    [expected] = fresh.generate([longer], [STRONG])
    assert second.cached >= 64
    assert same(second, expected)


def test_a_users_own_salt_keeps_parting_requests(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=32, enable_prefix_caching=True)
    prompt = tokens(4, 100)
    engine.generate([prompt], [STRONG], salts=["alice"])
    [bob] = engine.generate([prompt], [STRONG], salts=["bob"])
    [alice] = engine.generate([prompt], [STRONG], salts=["alice"])
    assert bob.cached == 0
    assert alice.cached == 96


def test_a_salt_that_steering_makes_opens_no_steered_blocks(make_engine: MakeEngine) -> None:
    from steering.request.cache_salt import cache_salt

    engine = make_engine(block_size=32, enable_prefix_caching=True)
    prompt = tokens(4, 100)
    [clean] = engine.generate([prompt], [None], salts=["elsewhere"])
    engine.generate([prompt], [STRONG])
    catalog = catalog_for(engine.llm.llm_engine.vllm_config)
    spec = catalog.parse(STRONG)
    forged = cache_salt(spec, catalog.prepare_now(spec).fingerprints, len(prompt), None)
    [thief] = engine.generate([prompt], [None], salts=[forged])
    assert thief.cached == 0
    assert same(thief, clean)
    [again] = engine.generate([prompt], [None], salts=[forged])
    assert again.cached == 96


def test_a_read_sees_prompt_tokens_that_the_prefix_cache_holds(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=32, enable_prefix_caching=True)
    prompt = tokens(5, 100)
    engine.generate([prompt], [None])
    [made] = engine.generate([prompt], [{"read": {"top_k": 3}}], max_tokens=4)
    read = made.steering[0].read["tokens"]
    ids = [*prompt, *made.tokens[:3]]
    covered = [i for i in range(1, 103) if ids[i] not in SPECIAL_TOKEN_IDS]
    assert [entry["position"] for entry in read] == covered
    assert [entry["id"] for entry in read] == [ids[i] for i in covered]
    assert {entry["phase"] for entry in read[:99]} == {"prompt"}


# Batches


def test_unsteered_requests_are_exactly_those_of_plain_vllm_in_the_same_batch(
    make_engine: MakeEngine,
) -> None:
    steering = make_engine()
    plain = make_engine(saes=())
    prompts = [tokens(10 + i, 12 + i) for i in range(6)]
    alone = steering.generate(prompts, [None] * 6)
    beside = steering.generate(prompts, [None, STRONG, None, OTHER, None, PROMPT_ONLY])
    expected = plain.generate(prompts, [None] * 6)
    for i in range(6):
        assert alone[i].logprobs == expected[i].logprobs
    for i in (0, 2, 4):
        assert beside[i].tokens == expected[i].tokens
        assert beside[i].logprobs == expected[i].logprobs
    for i in (1, 3, 5):
        assert beside[i].logprobs != expected[i].logprobs


def test_requests_keep_their_own_edits_while_the_batch_is_reordered_by_churn(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(max_num_seqs=4)
    rng = random.Random(0)
    count = 40
    prompts = [tokens(100 + i, rng.randint(3, 30)) for i in range(count)]
    fields = [rng.choice([None, STRONG, OTHER, PROMPT_ONLY, GENERATION_ONLY]) for _ in range(count)]
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=rng.randint(1, 20),
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if field is None else {"steering": field},
        )
        for field in fields
    ]
    outputs = engine.llm.generate(
        [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
    )
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        [alone] = engine.llm.generate([{"prompt_token_ids": prompt}], param, use_tqdm=False)
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids


def test_a_reused_slot_keeps_nothing_of_the_last_request(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    many = {"interventions": [{"feature": f, "op": "clamp", "value": 5} for f in range(20)]}
    prompt = tokens(6, 20)
    [expected] = engine.generate([prompt], [OTHER])
    engine.generate([prompt], [many])
    [after] = engine.generate([prompt], [OTHER])
    [clean_before] = make_engine(saes=()).generate([prompt], [None])
    [clean] = engine.generate([prompt], [None])
    assert same(after, expected)
    assert clean.logprobs == clean_before.logprobs
    assert engine.state.slots.in_use == 0


def test_more_steered_requests_than_slots_wait_and_all_are_steered(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(max_num_seqs=2)
    prompts = [tokens(200 + i, 10) for i in range(12)]
    fields = [reporting(STRONG if i % 2 else OTHER) for i in range(12)]
    made = engine.generate(prompts, fields)
    for prompt, field, result in zip(prompts, fields, made, strict=True):
        [alone] = engine.generate([prompt], [field])
        assert same(result, alone)
        assert edited(result) == 9 + generated(result)


def test_requests_whose_rows_do_not_fit_wait_and_all_are_steered(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=8, max_rows=64)
    fields = [
        {
            "interventions": [
                {"feature": 40 * i % 128 + f, "op": "add", "value": 0.5 + i}
                for f in range(40)
                if 40 * i % 128 + f < 128
            ],
            "report": True,
        }
        for i in range(8)
    ]
    prompts = [tokens(300 + i, 10) for i in range(8)]
    made = engine.generate(prompts, fields)
    for prompt, field, result in zip(prompts, fields, made, strict=True):
        [alone] = engine.generate([prompt], [field])
        assert same(result, alone)
        counts = {entry["tokens_edited"] for entry in result.steering[0].interventions}
        assert counts == {9 + generated(result)}
    engine.generate([prompts[0]], [None])  # the pass that tells the worker who has finished
    assert engine.state.rows.rows_in_use == 0
    assert engine.scheduler.get_request_counts() == (0, 0)


def test_requests_that_wait_for_rows_are_let_in_by_priority(make_engine: MakeEngine) -> None:
    from vllm import SamplingParams

    engine = make_engine(max_rows=64, scheduling_policy="priority", disable_log_stats=False)
    params = [
        SamplingParams(
            max_tokens=4,
            ignore_eos=True,
            detokenize=False,
            extra_args={
                "steering": {
                    "interventions": [
                        {"feature": f, "op": "add", "value": 1} for f in range(first, first + 64)
                    ]
                }
            },
        )
        for first in (0, 32, 64)  # no two fit together
    ]
    prompts: list[Any] = [{"prompt_token_ids": tokens(320 + i, 10)} for i in range(3)]
    outputs = engine.llm.generate(prompts, params, use_tqdm=False, priority=[0, 5, 1])
    began = [output.metrics.first_token_ts for output in outputs]
    assert began[0] < began[2] < began[1]


# Phases


@pytest.mark.parametrize("budget", [7, 16, 64])
def test_phase_follows_positions_whatever_the_chunks_of_the_prefill(
    make_engine: MakeEngine, budget: int
) -> None:
    whole = make_engine(max_num_batched_tokens=256)
    chunked = make_engine(
        max_num_batched_tokens=budget, max_num_seqs=2, enable_chunked_prefill=True
    )
    # With a budget of 7, prompts of 8 and 15 tokens leave one-token tails, which look like decodes.
    prompts = [tokens(400 + i, length) for i, length in enumerate((8, 15, 22, 50))]
    for field in (PROMPT_ONLY, GENERATION_ONLY):
        expected = whole.generate(prompts, [reporting(field)] * 4)
        made = chunked.generate(prompts, [reporting(field)] * 4)
        for left, right, prompt in zip(made, expected, prompts, strict=True):
            assert same(left, right)
            assert edited(left) == (len(prompt) - 1 if field is PROMPT_ONLY else generated(left))


@pytest.mark.parametrize("caches", [False, True], ids=["recomputed", "cached"])
def test_preempted_requests_have_the_right_phases_and_are_counted_once(
    make_engine: MakeEngine, caches: bool
) -> None:
    # With the cache, a request that resumes finds blocks of its own that are not computed again.
    roomy = make_engine(block_size=32, enable_prefix_caching=False)
    # Four requests grow to 100 tokens, four blocks each; there are nine.
    cramped = make_engine(
        block_size=32,
        enable_prefix_caching=caches,
        max_num_seqs=4,
        num_gpu_blocks_override=10,
        max_model_len=128,
    )
    prompts = [tokens(500 + i, 40) for i in range(4)]
    fields = [reporting(f) for f in (STRONG, GENERATION_ONLY, PROMPT_ONLY, OTHER)]
    preempted = count_preemptions(cramped)
    made = cramped.generate(prompts, fields, max_tokens=60)
    assert preempted() > 0
    for left, prompt, field in zip(made, prompts, fields, strict=True):
        [right] = roomy.generate([prompt], [field], max_tokens=60)
        assert left.tokens == right.tokens
        assert left.steering[0].tokens_cached == 0
        assert left.steering[0].interventions == [
            {
                **entry,
                "mean_activation": pytest.approx(entry["mean_activation"], rel=1e-4),
                "max_activation": pytest.approx(entry["max_activation"], rel=1e-4),
            }
            for entry in right.steering[0].interventions
        ]


def test_the_first_token_is_left_alone_unless_special_tokens_are_asked_for(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    ordinary_first = tokens(7, 20)[1:]
    specials_inside = [1, 50, 2, 60, 3, 70]
    for prompt, count in ((ordinary_first, 18), (specials_inside, 3)):
        [default] = engine.generate([prompt], [reporting(STRONG)], max_tokens=1)
        [everything] = engine.generate(
            [prompt],
            [reporting({**STRONG, "positions": {"special_tokens": True}})],
            max_tokens=1,
        )
        assert edited(default) == count
        assert edited(everything) == len(prompt)


def test_sinks_are_neither_edited_nor_read_and_are_counted(make_engine: MakeEngine) -> None:
    prompt = tokens(8, 30)
    both = {**reporting(STRONG), "read": {"top_k": 1}}  # a read takes the full path
    skipped = []
    for sink_norm in (1e-3, 1e6):
        engine = make_engine(sink_norm=sink_norm)
        for field in (reporting(STRONG), both):
            [made] = engine.generate([prompt], [field], max_tokens=1)
            entry = made.steering[0].interventions[0]
            assert entry["tokens_edited"] + entry["tokens_skipped"] == 29
            skipped.append(entry["tokens_skipped"])
        assert len(made.steering[0].read["tokens"]) == entry["tokens_edited"]
    assert skipped == [29, 29, 0, 0]


# Requests of other kinds


def test_every_child_of_n_choices_is_steered_and_reported(make_engine: MakeEngine) -> None:
    from vllm import SamplingParams

    from steering.vllm.results import results_of

    engine = make_engine()
    params = SamplingParams(
        n=3,
        seed=7,
        temperature=1.0,
        max_tokens=8,
        ignore_eos=True,
        extra_args={"steering": reporting(STRONG)},
    )
    [output] = engine.llm.generate([{"prompt_token_ids": tokens(9, 12)}], params, use_tqdm=False)
    results = results_of(engine.llm, output, params)
    assert [r.interventions[0]["tokens_edited"] for r in results] == [
        11 + ordinary(list(choice.token_ids)[:-1]) for choice in output.outputs
    ]
    assert len({tuple(choice.token_ids) for choice in output.outputs}) > 1


def test_tokens_cached_is_each_childs_own(make_engine: MakeEngine) -> None:
    from vllm import SamplingParams

    from steering.vllm.results import results_of

    engine = make_engine(block_size=32, enable_prefix_caching=True)
    params = SamplingParams(
        n=2, seed=7, max_tokens=1, ignore_eos=True, extra_args={"steering": reporting(STRONG)}
    )
    prompt = tokens(9, 100)
    [output] = engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    results = results_of(engine.llm, output, params)
    # The first child computes the prompt, and the second is served what that left in the cache.
    assert [result.tokens_cached for result in results] == [0, 96]
    assert [result.interventions[0]["tokens_edited"] for result in results] == [
        ordinary(prompt),
        ordinary(prompt[96:]),
    ]


def test_an_aborted_request_frees_its_slot_and_rows_and_leaves_neighbours_alone(
    make_engine: MakeEngine,
) -> None:
    from vllm import SamplingParams

    engine = make_engine(max_num_seqs=2)
    prompt = tokens(11, 12)
    [expected] = engine.generate([prompt], [OTHER], max_tokens=20)
    core = engine.llm.llm_engine
    for name, field in (("gone", STRONG), ("kept", OTHER)):
        core.add_request(
            name,
            {"prompt_token_ids": prompt},
            SamplingParams(
                max_tokens=20, temperature=0.0, ignore_eos=True, extra_args={"steering": field}
            ),
        )
    outputs: dict[str, Any] = {}
    for step in range(60):
        if step == 5:
            core.abort_request(["gone"])
        for output in core.step():
            outputs[output.request_id] = output
        if not core.has_unfinished_requests():
            break
    assert list(outputs["kept"].outputs[0].token_ids) == expected.tokens
    engine.generate([prompt], [None])
    assert engine.state.slots.in_use == 0
    assert engine.state.rows.rows_in_use == 0


def test_an_invalid_request_is_refused_before_anything_runs(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    bad = {"interventions": [{"feature": 128, "op": "ablate"}]}
    started: list[Any] = []
    add_request = engine.llm.llm_engine.add_request

    def seen(*args: Any, **kwargs: Any) -> Any:
        started.append(args)
        return add_request(*args, **kwargs)

    monkeypatch.setattr(engine.llm.llm_engine, "add_request", seen)
    with pytest.raises(ValueError, match=r"feature 128 not in \[0, 128\)"):
        engine.generate([tokens(12, 5), tokens(13, 5)], [None, bad])
    assert not started
    [after] = engine.generate([tokens(12, 5)], [None])
    assert len(after.tokens) == 8


def test_special_tokens_are_the_tokenizers_unless_they_are_named(make_engine: MakeEngine) -> None:
    engine = make_engine(special_token_ids=None)
    [made] = engine.generate([[1, 9, 2, 9]], [reporting(STRONG)], max_tokens=1)
    assert edited(made) == 2


def test_an_engine_without_saes_refuses_steering(make_engine: MakeEngine) -> None:
    engine = make_engine(saes=())
    with pytest.raises(ValueError, match="no SAE loaded"):
        engine.generate([tokens(12, 5)], [STRONG])


def test_the_last_sampled_token_is_not_counted(make_engine: MakeEngine) -> None:
    engine = make_engine()
    [made] = engine.generate([tokens(14, 5)], [reporting(GENERATION_ONLY)], max_tokens=1)
    assert edited(made) == 0
    entry = made.steering[0].interventions[0]
    assert entry["mean_activation"] is None
    assert entry["max_activation"] is None


def test_results_that_are_gone_are_not_given_as_nothing_edited(make_engine: MakeEngine) -> None:
    from vllm import SamplingParams

    from steering.vllm.results import results_of

    engine = make_engine()
    params = SamplingParams(max_tokens=3, extra_args={"steering": reporting(STRONG)})
    [output] = engine.llm.generate([{"prompt_token_ids": tokens(15, 5)}], params, use_tqdm=False)
    [result] = results_of(engine.llm, output, params)
    assert result.interventions[0]["tokens_edited"] > 0
    with pytest.raises(LookupError, match="nothing is recorded of choice 0"):
        results_of(engine.llm, output, params)
