"""Flags that are refused: ours beyond their limits, vLLM's where they leave no place for us."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest

from server.start.arguments import refuse_flags
from server.start.errors import RefusedStartError
from server.start.flags import ServerOptions

PLAIN: dict[str, Any] = {
    "worker_cls": "auto",
    "scheduler_cls": None,
    "additional_config": {},
    "skip_tokenizer_init": False,
    "grpc": False,
    "runner": "auto",
}


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("worker_cls", "my.Worker", "--worker-cls"),
        ("scheduler_cls", "my.Scheduler", "--scheduler-cls"),
        ("additional_config", {"steering": {}}, "--additional-config"),
        ("skip_tokenizer_init", True, "--skip-tokenizer-init"),
        ("grpc", True, "--grpc"),
        ("runner", "pooling", "--runner pooling"),
    ],
)
def test_flag_that_leaves_no_place_for_steering_is_refused(
    flag: str, value: Any, said: str
) -> None:
    with pytest.raises(RefusedStartError, match=said):
        refuse_flags(Namespace(**{**PLAIN, flag: value}), rust_frontend=False)


@pytest.mark.parametrize(
    ("option", "least", "said"),
    [
        ("max_rows", 64, "--steering-max-rows 63: must be at least 64, as many as one request may"),
        ("max_read_values", 64, "--steering-max-read-values 63: must be at least 64"),
        ("max_body_bytes", 1024, "--steering-max-body-bytes 1023: must be at least 1024"),
        ("max_study_tokens", 1, "--steering-max-study-tokens 0: must be at least 1"),
        ("study_share", 0.01, "--steering-study-share -0.99: must be at least 0.01"),
    ],
)
def test_option_below_its_limit_is_refused(option: str, least: Any, said: str) -> None:
    at, below = ({option: value} for value in (least, least - 1))
    replace(ServerOptions(), **at).check()
    with pytest.raises(RefusedStartError, match=said):
        replace(ServerOptions(), **below).check()


@pytest.mark.parametrize("share", [1.01, float("inf"), float("nan")])
def test_share_of_the_time_is_at_most_all_of_it(share: float) -> None:
    replace(ServerOptions(), study_share=1.0).check()
    with pytest.raises(RefusedStartError, match=f"--steering-study-share {share}: must be at "):
        replace(ServerOptions(), study_share=share).check()


def test_front_end_that_cannot_carry_steering_is_refused() -> None:
    refuse_flags(Namespace(**PLAIN), rust_frontend=False)
    with pytest.raises(RefusedStartError, match="VLLM_USE_RUST_FRONTEND"):
        refuse_flags(Namespace(**PLAIN), rust_frontend=True)
