"""An evaluation on a real engine, against transformers with hooks and numpy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from steering.studies.progress import Progress
from steering.studies.registry import STUDIES
from steering.studies.study import Context
from steering.vllm.door import catalog_for
from steering.vllm.reader import Finished, OfflineReader, Run
from steering.vllm.vocabulary import OfflineVocabulary
from tests.engine.engine import SPECIAL_TOKEN_IDS
from tests.engine.outputs import tokens
from tests.engine.scored import TOLERANCE, Scored, scored_engine

PAIR: dict[str, Any] = {
    "interventions": [
        {"sae": "a", "feature": 5, "op": "add", "value": 4},
        {"sae": "b", "feature": 9, "op": "scale", "value": 3, "positions": {"prompt": False}},
    ]
}
CLAMP: dict[str, Any] = {
    "interventions": [{"sae": "a", "feature": 3, "op": "clamp", "value": 6}],
    "max_share": 0.3,
}
GIVEN: tuple[dict[str, Any], ...] = (
    {"prompt": tokens(1, 12), "completion": tokens(2, 9)[1:]},
    {"prompt": "The weather in the north", "completion": " was cold, and there was snow"},
    {"messages": [{"role": "user", "content": "What is it?"}], "completion": "A house by the sea"},
)
SYSTEM = "The assistant answers it."


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scored]:
    with scored_engine(tmp_path_factory.mktemp("evaluate")) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(scored: Scored) -> Iterator[None]:
    yield
    assert scored.held == 0
    assert len(scored.engine.state.probes.kept) == 0


def context(scored: Scored, told: list[tuple[int, int]] | None = None) -> Context:
    llm = scored.engine.llm
    progress = Progress(None if told is None else lambda done, of: told.append((done, of)))
    catalog = catalog_for(llm.llm_engine.vllm_config)
    return Context(catalog, OfflineReader(llm), OfflineVocabulary(llm), progress=progress)


def evaluated(scored: Scored, body: Mapping[str, Any], **known: Any) -> dict[str, Any]:
    return asyncio.run(STUDIES["evaluate"].run(context(scored, **known), body))


def ids_of(scored: Scored, text: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Prompt and completion, by the tokenizer itself."""
    tokenizer = scored.engine.llm.get_tokenizer()
    if "messages" in text:
        prompt = tokenizer.apply_chat_template(
            text["messages"], add_generation_prompt=True, return_dict=False
        )
    else:
        prompt = text["prompt"]
        prompt = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    completion = text.get("completion", [])
    if isinstance(completion, str):
        completion = tokenizer.encode(completion, add_special_tokens=False)
    return list(prompt), list(completion)


class Right:
    """What an evaluation should say of one configuration, from distributions in float64."""

    def __init__(self) -> None:
        self.kl: list[np.ndarray] = []
        self.reverse: list[np.ndarray] = []
        self.before: list[np.ndarray] = []
        self.after: list[np.ndarray] = []
        self.same: list[np.ndarray] = []

    def add(self, log_p: np.ndarray, log_q: np.ndarray, ids: Sequence[int]) -> None:
        rows = np.arange(len(ids))
        self.kl.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        self.reverse.append((np.exp(log_q) * (log_q - log_p)).sum(-1))
        self.before.append(log_p[rows, ids])
        self.after.append(log_q[rows, ids])
        self.same.append(log_p.argmax(-1) == log_q.argmax(-1))

    def agrees(self, found: Mapping[str, Any]) -> None:
        kl, reverse, before, after, same = (
            np.concatenate(column)
            for column in (self.kl, self.reverse, self.before, self.after, self.same)
        )
        assert found["tokens"] == len(kl)
        assert found["kl"]["mean"] == pytest.approx(kl.mean(), abs=TOLERANCE)
        assert found["kl"]["max"] == pytest.approx(kl.max(), abs=TOLERANCE)
        assert found["kl"]["sum"] == pytest.approx(kl.sum(), abs=TOLERANCE * len(kl))
        assert found["reverse_kl"]["mean"] == pytest.approx(reverse.mean(), abs=TOLERANCE)
        assert found["nll"]["unsteered"] == pytest.approx(-before.mean(), abs=TOLERANCE)
        assert found["nll"]["steered"] == pytest.approx(-after.mean(), abs=TOLERANCE)
        assert found["top1_agreement"] == pytest.approx(same.mean(), abs=1.5 / len(kl))


def right(
    scored: Scored,
    texts: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
    field: Mapping[str, Any] | None,
) -> Right:
    """Of ``(prompt, the configuration's prompt, completion)``."""
    made = Right()
    for prompt, its, completion in texts:
        before = scored.reference(prompt, completion, None).numpy()
        made.add(before, scored.reference(its, completion, field).numpy(), completion)
    return made


def test_figures_on_given_completions_are_those_of_transformers_with_hooks(
    scored: Scored,
) -> None:
    told: list[tuple[int, int]] = []
    body = {
        "texts": list(GIVEN),
        "configurations": [
            {"name": "pair", "steering": {**PAIR, "read": {"sae": "a"}, "report": True}},
            {"name": "nothing", "steering": {"interventions": []}},
            {"name": "clamp", "steering": CLAMP},
        ],
        "detail": True,
    }
    answer = evaluated(scored, body, told=told)
    assert answer["object"] == "steering.evaluation"
    assert answer["noise"]["kl"] == pytest.approx(0, abs=1e-9)
    assert told[0] == (0, 9) and told[-1] == (9, 9)
    ids = [ids_of(scored, text) for text in GIVEN]
    texts = [(prompt, prompt, completion) for prompt, completion in ids]
    for found, field in zip(answer["configurations"], (PAIR, None, CLAMP), strict=True):
        right(scored, texts, field).agrees(found)
        assert found["answers"] == [None] * 3
        assert found["features"] == [] and found["interactions"] is None
        for i, (_, completion) in enumerate(ids):
            of_text = found["detail"][i]["tokens"]
            assert [token["id"] for token in of_text] == completion
            log_p = scored.reference(ids[i][0], completion, field).numpy()
            steered = log_p[np.arange(len(completion)), completion]
            assert [t["steered"] for t in of_text] == pytest.approx(steered, abs=TOLERANCE)
    decode = scored.engine.llm.get_tokenizer().decode
    first = answer["configurations"][0]["detail"][0]["tokens"][0]
    assert first["text"] == decode([first["id"]])


def test_report_of_all_texts_and_shares_are_those_of_the_reference(scored: Scored) -> None:
    body = {
        "texts": list(GIVEN),
        "configurations": [
            {"name": "pair", "steering": PAIR},
            {"name": "nothing", "steering": {"interventions": []}},
        ],
    }
    pair, nothing = evaluated(scored, body)["configurations"]
    assert (nothing["share"], nothing["edits"]) == (None, [])
    reports, shares = [], []
    for text in GIVEN:
        made = scored.model.trace(*ids_of(scored, text), scored.saes, PAIR)[1]
        reports.append(made.report()[0])
        shares += [share[~share.isnan()] for share, _ in made.shares.values()]
    every = np.concatenate(shares)
    assert pair["share"]["mean"] == pytest.approx(every.mean(), rel=1e-4)
    assert pair["share"]["max"] == pytest.approx(every.max(), rel=1e-4)
    for i, (edit, asked) in enumerate(zip(pair["edits"], PAIR["interventions"], strict=True)):
        assert {name: edit[name] for name in ("sae", "feature", "op")} == {
            name: asked[name] for name in ("sae", "feature", "op")
        }
        of_texts = [report[i] for report in reports]
        edited = sum(one["tokens_edited"] for one in of_texts)
        assert edit["tokens_edited"] == edited
        assert edit["tokens_active"] == sum(one["tokens_active"] for one in of_texts)
        mean = sum(one["mean_activation"] * one["tokens_edited"] for one in of_texts) / edited
        assert edit["mean_activation"] == pytest.approx(mean, rel=1e-4)
        largest = max(one["max_activation"] for one in of_texts)
        assert edit["max_activation"] == pytest.approx(largest, rel=1e-4)


def test_each_configuration_answers_a_text_without_completion_itself(scored: Scored) -> None:
    messages = [
        {"role": "system", "content": "She said nothing."},
        {"role": "user", "content": "How many words?"},
    ]
    body = {
        "texts": [{"messages": messages}],
        "configurations": [
            {"name": "clamp", "steering": CLAMP},
            {"name": "system", "system": SYSTEM},
        ],
        "max_tokens": 7,
    }
    clamp, system = evaluated(scored, body)["configurations"]
    own = ids_of(scored, {"messages": messages})[0]
    put = [{"role": "system", "content": SYSTEM}, messages[1]]
    other = ids_of(scored, {"messages": put})[0]
    assert own != other
    generated = scored.engine.generate([own, other], [CLAMP, None], max_tokens=7)
    tokenizer = scored.engine.llm.get_tokenizer()
    for found, prompt, made, field in (
        (clamp, own, generated[0], CLAMP),
        (system, other, generated[1], None),
    ):
        ids = made.tokens
        if tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
        assert found["tokens"] == len(ids)
        assert found["answers"] == [tokenizer.decode(ids, skip_special_tokens=True)]
        right(scored, [(own, prompt, ids)], field).agrees(found)
    assert (system["share"], system["edits"], system["interactions"]) == (None, [], None)
    assert clamp["share"]["max"] <= 0.3 + 1e-6


def test_answer_is_the_text_that_a_client_would_be_served(scored: Scored) -> None:
    tokenizer = scored.engine.llm.get_tokenizer()
    prompts = [[1, 5 + i, 9 + 2 * i] for i in range(60)]
    # Special tokens in the middle belong to the answer, but are not shown; nor is what ends it.
    odd = [
        (prompt, made.tokens)
        for prompt, made in zip(
            prompts,
            scored.engine.generate(prompts, [None] * len(prompts), max_tokens=12),
            strict=True,
        )
        if {*made.tokens[:-1]} & {*SPECIAL_TOKEN_IDS} or made.tokens[-1] == tokenizer.eos_token_id
    ][:4]
    assert odd
    body = {
        "texts": [{"prompt": prompt} for prompt, _ in odd],
        "configurations": [{"name": "nothing", "steering": {"interventions": []}}],
        "max_tokens": 12,
        "detail": True,
    }
    (found,) = evaluated(scored, body)["configurations"]
    for (_, ids), answer, detail in zip(odd, found["answers"], found["detail"], strict=True):
        scored_ids = [token["id"] for token in detail["tokens"]]
        assert scored_ids == ids[: len(scored_ids)]
        assert answer == tokenizer.decode(scored_ids, skip_special_tokens=True)


def test_system_message_stands_before_a_given_completion(scored: Scored) -> None:
    body = {"texts": [GIVEN[2]], "configurations": [{"name": "s", "system": SYSTEM}]}
    (found,) = evaluated(scored, body)["configurations"]
    own, completion = ids_of(scored, GIVEN[2])
    put = [{"role": "system", "content": SYSTEM}, *GIVEN[2]["messages"]]
    other = ids_of(scored, {"messages": put})[0]
    right(scored, [(own, other, completion)], None).agrees(found)


def test_interactions_compare_edits_together_with_each_alone(scored: Scored) -> None:
    body = {
        "texts": list(GIVEN[:2]),
        "configurations": [
            {"name": "pair", "steering": PAIR},
            {"name": "one", "steering": CLAMP},
            {"name": "nothing", "steering": {"interventions": []}},
        ],
        "interactions": True,
    }
    pair, one, nothing = evaluated(scored, body)["configurations"]
    texts = [(prompt, prompt, ids) for prompt, ids in (ids_of(scored, t) for t in GIVEN[:2])]

    def rise(field: Mapping[str, Any]) -> float:
        made = right(scored, texts, field)
        return float((np.concatenate(made.before) - np.concatenate(made.after)).mean())

    alone = [rise({**PAIR, "interventions": [edit]}) for edit in PAIR["interventions"]]
    for found, edit, value in zip(
        pair["interactions"]["alone"], PAIR["interventions"], alone, strict=True
    ):
        assert (found["sae"], found["feature"]) == (edit["sae"], edit["feature"])
        assert found["nll"] == pytest.approx(value, abs=TOLERANCE)
    size = sum(map(abs, alone))
    assert pair["interactions"]["additivity"] == pytest.approx(
        abs(rise(PAIR) - sum(alone)) / size, abs=4 * TOLERANCE / size
    )
    assert one["interactions"]["additivity"] == 0
    assert one["interactions"]["alone"][0]["nll"] == pytest.approx(rise(CLAMP), abs=TOLERANCE)
    assert nothing["interactions"] == {"alone": [], "additivity": None}


def test_features_are_read_on_the_same_texts_unsteered_and_steered(scored: Scored) -> None:
    body = {
        "texts": list(GIVEN),
        "configurations": [
            {"name": "pair", "steering": PAIR},
            {"name": "nothing", "steering": {"interventions": []}},
        ],
        "features": [{"sae": "a", "top_k": 3}, {"sae": "b"}, {"sae": "a", "top_k": 1}],
    }
    pair, nothing = evaluated(scored, body)["configurations"]
    first, second, again = pair["features"]
    assert [one["sae"] for one in pair["features"]] == ["a", "b", "a"]
    assert again["moved"] == first["moved"][:1] and len(second["moved"]) <= 10
    assert first["leak"] is not None and second["leak"] is not None
    (edited,) = first["edited"]
    # Over the covered tokens: all but the first of each text and the special ones.
    before: list[float] = []
    after: list[float] = []
    for text in GIVEN:
        prompt, completion = ids_of(scored, text)
        seen: dict[str, Any] = {}
        scored.model.trace(prompt, completion, scored.saes, None, seen)
        covered = [i for i, t in enumerate([*prompt, *completion][:-1]) if i and t > 3]
        sae, x = scored.saes["a"], seen["a"][covered]
        before += sae.encode(x)[:, 5].tolist()
        after += sae.encode(x + 4 * sae.weights["W_dec"][5])[:, 5].tolist()
    assert edited["feature"] == 5
    assert edited["before"] == pytest.approx(np.mean(before), abs=1e-4)
    assert edited["after"] == pytest.approx(np.mean(after), abs=1e-4)
    for one in nothing["features"]:
        assert (one["edited"], one["leak"], one["newly_active"], one["silenced"]) == (
            *([], None, 0, 0),
        )


def test_text_runs_once_unsteered_and_once_a_configuration_with_features_or_without(
    scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    each, ran = OfflineReader.each, list[Run]()

    def counted(
        reader: OfflineReader, runs: Iterable[Run]
    ) -> AsyncGenerator[tuple[int, Finished], None]:
        made = list(runs)
        ran.extend(made)
        return each(reader, made)

    monkeypatch.setattr(OfflineReader, "each", counted)
    body = {
        "texts": list(GIVEN),
        "configurations": [
            {"name": "clamp", "steering": CLAMP},
            {"name": "nothing", "steering": {"interventions": []}},
        ],
    }
    for features in ([], [{"sae": "a"}, {"sae": "b"}]):
        ran.clear()
        evaluated(scored, {**body, "features": features})
        assert len(ran) == 3 * len(GIVEN)


def test_noise_without_a_control_is_of_a_text_that_is_run_again(scored: Scored) -> None:
    told: list[tuple[int, int]] = []
    body = {"texts": list(GIVEN), "configurations": [{"name": "clamp", "steering": CLAMP}]}
    answer = evaluated(scored, body, told=told)
    assert answer["noise"]["kl"] == pytest.approx(0, abs=1e-9)
    assert told[-1] == (4, 4)
