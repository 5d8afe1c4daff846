"""An Inspect task of one sample, run on the base, a preset and with a `steering` field."""

import json
import sys

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

asked = json.loads(sys.argv[1])


def run(model, extra_body=None):
    task = Task(
        dataset=[Sample(input=asked["question"], target=asked["target"])],
        solver=generate(),
        scorer=includes(),
    )
    config = GenerateConfig(
        temperature=0, max_tokens=asked["max_tokens"], max_retries=0, extra_body=extra_body
    )
    served = get_model(
        f"openai-api/vllm/{model}", base_url=asked["base_url"], api_key="none", config=config
    )
    [log] = eval(task, model=served, display="none", log_dir=asked["folder"])
    assert log.status == "success", log.error
    [sample] = log.samples
    return {
        "text": sample.output.completion,
        "model": sample.output.model,
        "score": sample.scores["includes"].value,
        "report": '"tokens_edited"' in log.model_dump_json(),
    }


base, preset = run(asked["base"]), run(asked["preset"])
field = run(asked["base"], {"steering": asked["steering"]})
print(
    json.dumps(
        {
            "base": base["text"],
            "preset": preset["text"],
            "field": field["text"],
            "model": preset["model"],
            "scores": [base["score"], preset["score"], field["score"]],
            "report": field["report"],
        }
    )
)
