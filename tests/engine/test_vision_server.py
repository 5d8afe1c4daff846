"""Gemma 3 with its vision tower over HTTP: images are served, and their tokens are no text's.

The towers are of equal depth, so that layers found in the wrong one would be edited in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from torch import Tensor

from tests.engine import server
from tests.engine.draws import MARGIN, TOLERANCE
from tests.engine.reference import ReferenceModel, ReferenceSAE, margin
from tests.engine.server import LiveServer
from tests.engine.vision_model import IMAGE_ID, TOKENS_AN_IMAGE, data_url, make_vision_model, noise
from tests.models import make_tiny_sae

# The first test to ask waits for the server.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SPECIAL: Final = (0, 1, 2, 3, 320, 321, 322)
SAES: Final[dict[str, dict[str, Any]]] = {
    "a": {"architecture": "jumprelu", "threshold": 0.2},
    "b": {"architecture": "standard", "layer": 2, "hook_kind": "hook_mlp_out", "seed": 1},
    "c": {"architecture": "standard", "layer": 3, "hook_kind": "hook_attn_out", "seed": 2},
}
EDITS: Final = [
    {"sae": "a", "feature": 3, "op": "clamp", "value": 6.0},
    {"sae": "b", "feature": 9, "op": "scale", "value": -2.0},
    {"sae": "c", "feature": 5, "op": "add", "value": 3.0},
]
FIELDS: Final[dict[str, dict[str, Any] | None]] = {
    "unsteered": None,
    "steered": {"interventions": EDITS},
    "special tokens too": {"interventions": EDITS, "positions": {"special_tokens": True}},
    "prompt alone": {"interventions": EDITS, "positions": {"generation": False}},
    "generation alone": {"interventions": EDITS, "positions": {"prompt": False}},
}


@dataclass
class Answered:
    """What the server generated, and the sequence that it did so from."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    steering: dict[str, Any] | None

    @property
    def entered(self) -> list[int]:
        """The tokens that entered the model."""
        return [*self.prompt, *self.tokens][:-1]


class WithImages:
    """A transformers model that is given the images beside the tokens.

    An image's tokens see what is before them alone, as in vLLM on a CPU; without the types of the
    tokens transformers does the same.
    """

    def __init__(self, model: Any, images: list[Any], processor: Any) -> None:
        self._model = model
        self._pixels = processor(images=images, return_tensors="pt")["pixel_values"]

    def __call__(self, ids: Tensor) -> Any:
        return self._model(ids, pixel_values=self._pixels)


class Vision:
    """The server and what it is held against."""

    def __init__(self, served: LiveServer) -> None:
        from transformers import AutoImageProcessor

        self.served = served
        self.saes = {name: ReferenceSAE(path) for name, path in served.saes.items()}
        self.reference = ReferenceModel(served.model, SPECIAL)
        self._model = self.reference.model
        self._processor = AutoImageProcessor.from_pretrained(served.model)

    def ask(self, images: list[Any], steering: object, **more: Any) -> Answered:
        """A chat whose only message has a text around each image."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": "the lazy dog "}]
        for image in images:
            parts.append({"type": "image_url", "image_url": {"url": data_url(image)}})
            parts.append({"type": "text", "text": " is by the sea "})
        asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 6, **more}
        asked |= {"logprobs": True, "return_token_ids": True, "ignore_eos": True}
        answer = self.served.post("/v1/chat/completions", server.with_steering(asked, steering))
        assert answer.status_code == 200, answer.text
        body = answer.json()
        (choice,) = body["choices"]
        return Answered(
            body["prompt_token_ids"],
            choice["token_ids"],
            [token["logprob"] for token in choice["logprobs"]["content"]],
            body.get("steering"),
        )

    def expected(
        self, made: Answered, images: list[Any], field: dict[str, Any] | None
    ) -> tuple[list[float], dict[str, Tensor]]:
        """The reference's log-probabilities of the generated tokens, and the streams it saw."""
        seen: dict[str, Tensor] = {}
        self.reference.model = (
            WithImages(self._model, images, self._processor) if images else self._model
        )
        logprobs = self.reference.logprobs(made.prompt, made.tokens, self.saes, field, seen)
        return logprobs[range(len(made.tokens)), made.tokens].tolist(), seen


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vision]:
    folder = tmp_path_factory.mktemp("vision")
    saes = {name: make_tiny_sae(folder / name, **kwargs) for name, kwargs in SAES.items()}
    with pytest.MonkeyPatch.context() as patch:
        found = (str(Path(__file__).parent / "pillow"), os.environ.get("PYTHONPATH"))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, found)))
        running = server.start(
            *(make_vision_model(folder / "model"), saes, folder / "server.log"),
            *("--max-model-len", "256", "--no-steering-self-check"),
        )
    try:
        server.wait_until_ready(running)
        yield Vision(running)
    finally:
        running.stop()


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("name", FIELDS)
def test_answers_beside_images_have_the_log_probabilities_of_transformers(
    vision: Vision, name: str, images: int
) -> None:
    shown, field = [noise(seed) for seed in range(images)], FIELDS[name]
    made = vision.ask(shown, field)
    assert made.prompt.count(IMAGE_ID) == TOKENS_AN_IMAGE * images
    expected, seen = vision.expected(made, shown, field)
    assert margin(vision.saes, seen, field) > MARGIN
    assert made.logprobs == pytest.approx(expected, abs=TOLERANCE)
    if field is not None:
        plain, _ = vision.expected(made, shown, None)
        assert max(abs(a - b) for a, b in zip(made.logprobs, plain, strict=True)) > 0.1


def test_tokens_of_an_image_are_neither_edited_nor_read_unless_they_are_asked_for(
    vision: Vision,
) -> None:
    field = {"interventions": EDITS, "report": True, "read": {"sae": "a", "top_k": 2}}
    for asked in (False, True):
        made = vision.ask([noise(0)], {**field, "positions": {"special_tokens": asked}})
        covered = [t for t, i in enumerate(made.entered) if asked or (t and i not in SPECIAL)]
        images = {t for t, i in enumerate(made.entered) if i == IMAGE_ID}
        assert len(images) == TOKENS_AN_IMAGE
        assert images <= set(covered) if asked else not images & set(covered)
        assert made.steering is not None
        for entry in made.steering["interventions"]:
            assert entry["tokens_edited"] == len(covered)
        assert [token["position"] for token in made.steering["read"]["tokens"]] == covered


def test_an_edit_of_image_tokens_alone_reaches_the_answer(vision: Vision) -> None:
    image = noise(0)
    prompt = vision.ask([image], None).prompt
    first = prompt.index(IMAGE_ID)
    window = {"start": first, "end": first + TOKENS_AN_IMAGE}
    for special in (False, True):
        positions = {**window, "special_tokens": special}
        field = {"interventions": EDITS[:1], "positions": positions, "report": True}
        made = vision.ask([image], field)
        expected, _ = vision.expected(made, [image], field)
        assert made.logprobs == pytest.approx(expected, abs=TOLERANCE)
        assert made.steering is not None
        (entry,) = made.steering["interventions"]
        assert entry["tokens_edited"] == (TOKENS_AN_IMAGE if special else 0)
        plain, _ = vision.expected(made, [image], None)
        apart = max(abs(a - b) for a, b in zip(made.logprobs, plain, strict=True))
        assert apart > 0.01 if special else apart < TOLERANCE


def test_another_image_or_another_edit_shares_no_blocks(vision: Vision) -> None:
    # A block of 128 tokens has to be full before it is shared.
    text = "the quick brown fox jumps over the lazy dog " * 12

    def cached(seed: int, steering: object) -> int:
        parts = [
            {"type": "image_url", "image_url": {"url": data_url(noise(seed))}},
            {"type": "text", "text": text},
        ]
        asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
        answer = vision.served.post(
            "/v1/chat/completions", server.with_steering(asked, steering)
        ).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    steered = {"interventions": EDITS}
    assert [cached(0, None), cached(1, None), cached(0, steered), cached(1, steered)] == [0] * 4
    assert min(cached(0, None), cached(0, steered)) > 0
