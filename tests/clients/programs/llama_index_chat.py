"""LlamaIndex's OpenAILike: answers of the base, a preset and a `steering` field."""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

asked = json.loads(sys.argv[1])


def llm(model, **more):
    return OpenAILike(
        api_base=asked["base_url"],
        api_key="none",
        model=model,
        is_chat_model=True,
        temperature=0,
        max_tokens=asked["max_tokens"],
        max_retries=0,
        **more,
    )


messages = [ChatMessage(role="user", content=asked["question"])]
base, preset = llm(asked["base"]), llm(asked["preset"])
field = llm(asked["base"], additional_kwargs={"extra_body": {"steering": asked["steering"]}})
reported = field.chat(messages)
print(
    json.dumps(
        {
            "base": base.chat(messages).message.content,
            "preset": preset.chat(messages).message.content,
            "field": reported.message.content,
            "streamed": "".join(chunk.delta or "" for chunk in preset.stream_chat(messages)),
            "field streamed": "".join(chunk.delta or "" for chunk in field.stream_chat(messages)),
            "model": preset.chat(messages).raw.model,
            "report": "steering" in (reported.raw.model_extra or {}),
        }
    )
)
