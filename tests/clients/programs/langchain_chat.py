"""LangChain: answers of the base, a preset and a `steering` field, whole and streamed."""

import json
import sys

from langchain_openai import ChatOpenAI

asked = json.loads(sys.argv[1])


def chat(model, **more):
    return ChatOpenAI(
        base_url=asked["base_url"],
        api_key="none",
        model=model,
        temperature=0,
        max_tokens=asked["max_tokens"],
        max_retries=0,
        **more,
    )


base, preset = chat(asked["base"]), chat(asked["preset"])
field = chat(asked["base"], extra_body={"steering": asked["steering"]})
reported = field.invoke(asked["question"])
print(
    json.dumps(
        {
            "base": base.invoke(asked["question"]).content,
            "preset": preset.invoke(asked["question"]).content,
            "field": reported.content,
            "streamed": "".join(chunk.content for chunk in preset.stream(asked["question"])),
            "field streamed": "".join(chunk.content for chunk in field.stream(asked["question"])),
            "model": preset.invoke(asked["question"]).response_metadata["model_name"],
            "report": "steering" in reported.model_dump_json(),
        }
    )
)
