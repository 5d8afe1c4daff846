"""Answer the requests of a file by one engine, and write down what came: a process of its own.

``python -m tests.gpu.engine_run TASK.json OUT.json``; `tests/gpu/battery.py` says what they hold.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any


def main() -> None:
    """Start the engine, run every wave, and write the file: what came until something broke."""
    from vllm import LLM

    from steering import SteeringLLM

    task = json.loads(Path(sys.argv[1]).read_text())
    arguments = {**task["arguments"], "worker_extension_cls": "tests.gpu.watch.GraphWatch"}
    saes = [f"{name}={source}" for name, source in task["saes"].items()]
    llm = (
        SteeringLLM(task["checkpoint"], saes=saes, **arguments)
        if saes
        else LLM(task["checkpoint"], **arguments)
    )
    config = llm.llm_engine.vllm_config
    found: dict[str, Any] = {
        "engine": {
            **llm.collective_rpc("watch_graphs")[0],
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
        },
        "waves": {},
        "graphs": {},
    }
    try:
        for wave, names in task["waves"].items():
            llm.collective_rpc("graphs_taken")
            found["waves"][wave] = answers(llm, {name: task["requests"][name] for name in names})
            found["graphs"][wave] = llm.collective_rpc("graphs_taken")[0]
        if saes:
            found["scored"] = scored(llm, task["scored"])
    finally:
        Path(sys.argv[2]).write_text(json.dumps(found))
        llm.llm_engine.engine_core.shutdown()


def answers(llm: Any, requests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What all of them get, sent at once."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=request["max_tokens"], temperature=0.0, ignore_eos=True, logprobs=1
        )
        for request in requests.values()
    ]
    prompts: Any = [{"prompt_token_ids": request["prompt"]} for request in requests.values()]
    fields = [request["steering"] for request in requests.values()]
    options = {"steering": fields} if any(fields) else {}
    outputs = llm.generate(prompts, params, use_tqdm=False, **options)
    found = {}
    for name, output in zip(requests, outputs, strict=True):
        (choice,) = output.outputs
        steps = zip(choice.logprobs, choice.token_ids, strict=True)
        found[name] = {
            "tokens": list(choice.token_ids),
            "logprobs": [step[token].logprob for step, token in steps],
            "stop_reason": choice.stop_reason,
            "steering": getattr(output, "steering", None),
        }
    return found


def scored(llm: Any, text: dict[str, Any]) -> dict[str, list[float]]:
    """A text's KL by position, steered and beside itself."""
    from steering.request.accepted import accept
    from steering.studies.comparison import Comparison, Side
    from steering.studies.scoring import Scorer
    from steering.vllm.reader import OfflineReader

    scorer = Scorer(OfflineReader(llm))
    prompt, completion = tuple(text["prompt"]), tuple(text["completion"])
    unsteered = Side(prompt, completion)
    steered = Side(prompt, completion, accept(text["steering"], llm.catalog))

    async def run() -> dict[int, list[float]]:
        comparison = Comparison(unsteered, [(steered, ()), (unsteered, ())])
        async with aclosing(scorer.compare_all([comparison])) as figures:
            return {side: each.kl.tolist() async for _, side, each in figures}

    found = asyncio.run(run())
    return {"steered": found[0], "itself": found[1]}


if __name__ == "__main__":
    main()
