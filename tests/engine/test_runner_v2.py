"""The path that CUDA users get: runner V2 and the Triton kernel, run by Triton's interpreter.

The tests are those of runner V1, in a child process whose Triton interprets. What the interpreter
makes slow beyond reason (long generations, many engines) is left to V1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.engine.interpreted import INTERPRETER

SELECTION: Final = (
    "test_traps.py::test_blocks_of_a_steered_request_are_never_served_to_a_clean_one",
    "test_traps.py::test_equal_steering_shares_blocks_and_different_steering_does_not",
    "test_traps.py::test_a_read_sees_prompt_tokens_that_the_prefix_cache_holds",
    "test_traps.py::test_unsteered_requests_are_exactly_those_of_plain_vllm_in_the_same_batch",
    "test_traps.py::test_a_reused_slot_keeps_nothing_of_the_last_request",
    "test_traps.py::test_more_steered_requests_than_slots_wait_and_all_are_steered",
    "test_traps.py::test_phase_follows_positions_whatever_the_chunks_of_the_prefill[7]",
    "test_traps.py::test_preempted_requests_have_the_right_phases_and_are_counted_once[cached]",
    "test_traps.py::test_sinks_are_neither_edited_nor_read_and_are_counted",
    "test_traps.py::test_every_child_of_n_choices_is_steered_and_reported",
    "test_traps.py::test_an_aborted_request_frees_its_slot_and_rows_and_leaves_neighbours_alone",
    "test_scoring.py::test_preempted_text_is_scored_as_one_that_was_not",
    "test_equivalence.py::test_steered_log_probabilities_agree_with_transformers_and_hooks"
    "[llama-jumprelu-and-standard]",
)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_runner_v2_passes_the_tests_of_runner_v1() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is the child process")
    here = Path(__file__).parent
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("--timeout", "1200", *(str(here / test) for test in SELECTION)),
        ],
        env={**os.environ, **INTERPRETER},
        cwd=here.parents[1],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1400,
    )
    assert finished.returncode == 0, finished.stdout[-6000:]
    assert f"{len(SELECTION)} passed" in finished.stdout, finished.stdout[-2000:]
