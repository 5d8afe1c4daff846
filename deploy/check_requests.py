"""What `check_image.sh` asks of the server, from beside it: keys, steering, and a drain.

The last answer is still being streamed when SIGTERM reaches process 1, and must arrive whole.
"""

import os
import signal

from openai import AuthenticationError, OpenAI

KEY = "a-key-for-the-check"  # what check_image.sh started the server with
PROMPT = "Tell me about your day."
STREAMED_TOKENS = 200
#: The demo's feature that turns answers to music.
STEERING = {
    "interventions": [{"feature": 2417, "op": "clamp", "value": 1, "unit": "max_act"}],
    "report": True,
}


def main() -> None:
    with OpenAI(base_url="http://127.0.0.1:8000/v1", api_key=KEY, timeout=300) as client:
        refuse_wrong_key()
        steer(client)
        drain(client)


def refuse_wrong_key() -> None:
    with OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="another") as client:
        try:
            client.models.list()
        except AuthenticationError:
            print("wrong key: refused")
        else:
            raise SystemExit("a wrong key was accepted")


def steer(client: OpenAI) -> None:
    """One prompt as it is and steered: the texts differ, and the report says what was edited."""
    texts = []
    for extra in ({}, {"steering": STEERING}):
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": PROMPT}],
            temperature=0,
            max_tokens=24,
            extra_body=extra,
        )
        texts.append(answer.choices[0].message.content)
    report = (answer.model_extra or {})["steering"]["interventions"][0]
    if texts[0] == texts[1] or report["tokens_edited"] == 0:
        raise SystemExit(f"not steered: {texts}, {report}")
    print(f"steered: {report['tokens_edited']} tokens edited")
    print(f"  as it is: {texts[0]!r}\n  steered:  {texts[1]!r}")


def drain(client: OpenAI) -> None:
    """SIGTERM in the middle of a stream, which ends as if nothing had happened."""
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        max_tokens=STREAMED_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "steering": STEERING},
    )
    finish_reason = usage = report = None
    for i, chunk in enumerate(stream):
        if i == 2:
            os.kill(1, signal.SIGTERM)
        if chunk.choices:
            finish_reason = chunk.choices[0].finish_reason or finish_reason
        usage = chunk.usage or usage
        report = (chunk.model_extra or {}).get("steering") or report
    if finish_reason != "length" or usage is None or usage.completion_tokens != STREAMED_TOKENS:
        raise SystemExit(f"cut off by SIGTERM: {finish_reason}, {usage}")
    if report is None:
        raise SystemExit("no report after SIGTERM")
    print(f"SIGTERM after 2 chunks: all {STREAMED_TOKENS} tokens arrived, and the report")


main()
