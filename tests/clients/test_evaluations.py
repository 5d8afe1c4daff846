"""Evaluation harnesses: scores of a preset are those of the steered model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.clients.conftest import (
    CLIENTS,
    EDIT,
    HERE,
    MAX_TOKENS,
    PRESET,
    QUESTION,
    STEERING,
    Clients,
    assert_answers,
    python,
)
from tests.engine.reference import ReferenceModel, ReferenceSAE
from tests.engine.server import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TASKS: Final = HERE / "tasks"
#: Of log-probabilities that are sums over a few tokens.
TOLERANCE: Final = 2e-3


def lm_eval(
    clients: Clients, model: str, tasks: str, generation: Mapping[str, Any] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Each task's samples, as `--log_samples` writes them."""
    out = clients.folder / model / tasks / ("field" if generation else "name")
    where = f"base_url={clients.base_url}/completions"
    tokenizer = f"tokenizer={clients.served.model}"
    clients.run(
        *(python("main"), "-m", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", f"{where},model={model},{tokenizer},num_concurrent=2,max_retries=1"),
        *("--tasks", tasks, "--include_path", TASKS, "--log_samples", "--output_path", out),
        *(() if generation is None else ("--gen_kwargs", json.dumps(generation))),
        cwd=TASKS,
    )
    return {
        task: [
            json.loads(line)
            for file in out.rglob(f"samples_{task}_*.jsonl")
            for line in file.read_text().splitlines()
        ]
        for task in tasks.split(",")
    }


def by_transformers(
    model: Path, sae: Path, steering: Mapping[str, Any] | None
) -> list[list[float]]:
    """The log-probability of each choice of each question."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = ReferenceModel(model, tokenizer.all_special_ids)
    saes = {"l14": ReferenceSAE(sae, 2000.0)}
    scores: list[list[float]] = []
    for line in (TASKS / "weather.jsonl").read_text().splitlines():
        item = json.loads(line)
        context = tokenizer.encode(item["text"])
        scores.append([])
        for choice in item["choices"]:
            ids = tokenizer.encode(item["text"] + choice)
            assert ids[: len(context)] == context
            rest = ids[len(context) :]
            found = reference.logprobs(context, rest, saes if steering else {}, steering)
            scores[-1].append(float(found[range(len(rest)), rest].sum()))
    return scores


@pytest.mark.needs("main/lm_eval")
def test_lm_eval_scores_a_preset_as_transformers_with_hooks_does(clients: Clients) -> None:
    served, found = clients.served, {}
    for model, steering in ((MODEL, None), (PRESET, {"interventions": [EDIT]})):
        made = lm_eval(clients, model, "weather_choice,weather_story")
        [*choices] = sorted(made["weather_choice"], key=lambda sample: sample["doc_id"])
        scores = [[float(score) for [[score, _]] in sample["resps"]] for sample in choices]
        expected = by_transformers(served.model, served.saes["l14"], steering)
        for ours, theirs in zip(scores, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=TOLERANCE)
        stories = sorted(made["weather_story"], key=lambda sample: sample["doc_id"])
        texts = [sample["resps"][0][0] for sample in stories]
        for sample, text in zip(stories, texts, strict=True):
            body = {"max_tokens": 12, "stop": ["\n\n"], "model": model}
            answer = served.complete(sample["doc"]["text"], **body)
            assert answer.json()["choices"][0]["text"].startswith(text)
        found[model] = scores, texts
    (base, base_texts), (steered, steered_texts) = found[MODEL], found[PRESET]
    for ours, theirs in zip(base, steered, strict=True):
        assert ours != pytest.approx(theirs, abs=0.05)
    assert base_texts != steered_texts
    by_field = lm_eval(clients, MODEL, "weather_story", {"steering": STEERING})["weather_story"]
    texts = [s["resps"][0][0] for s in sorted(by_field, key=lambda sample: sample["doc_id"])]
    assert texts == steered_texts


@pytest.mark.needs("main/inspect_ai")
def test_inspect_steers_by_preset_and_field_and_logs_the_report(clients: Clients) -> None:
    expected = clients.answers()
    # A word that the steered answer has and the other, in small letters too, has not.
    words = [w for w in expected[1].split() if w.isalpha() and w.lower() not in expected[0].lower()]
    word = max(words, key=len)
    found = clients.program(python("main"), "inspect_task.py", target=word)
    assert_answers(found, expected, PRESET)
    assert found["scores"] == ["I", "C", "C"]
    assert found["report"] is True


@pytest.mark.needs("npm/promptfoo")
def test_promptfoo_steers_by_preset_and_field(clients: Clients) -> None:
    base, steered = clients.answers()
    options = {
        "apiBaseUrl": clients.base_url,
        "apiKey": "none",
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    providers = [
        {"id": f"openai:chat:{MODEL}", "label": "base", "config": options},
        {"id": f"openai:chat:{PRESET}", "label": "preset", "config": options},
        {
            "id": f"openai:chat:{MODEL}",
            "label": "field",
            "config": {**options, "passthrough": {"steering": STEERING}},
        },
    ]
    config = {
        "prompts": ["{{question}}"],
        "providers": providers,
        "tests": [{"vars": {"question": QUESTION}, "assert": [{"type": "equals", "value": base}]}],
    }
    file, out = clients.folder / "promptfooconfig.yaml", clients.folder / "out.json"
    file.write_text(yaml.safe_dump(config))
    quiet = ("--no-cache", "--no-table", "--no-write", "--no-progress-bar")
    # It answers 100 where an assertion fails, as two of these must.
    clients.run(
        *("node", CLIENTS / "node_modules/promptfoo/dist/src/entrypoint.js", "eval"),
        *("-c", file, "-o", out, *quiet),
        code=100,
    )
    results = json.loads(out.read_text())["results"]["results"]
    found = {each["provider"]["label"]: each["response"]["output"] for each in results}
    assert found == {"base": base, "preset": steered, "field": steered}
    assert {each["provider"]["label"]: each["success"] for each in results} == {
        "base": True,
        "preset": False,
        "field": False,
    }
