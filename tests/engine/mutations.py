"""Takes out one remedy after the other and shows that the trap's test notices.

``python -m tests.engine.mutations [NAME ...]`` copies the code to a temporary folder, changes one
place, runs the test of that trap there, and prints a line for each: ``caught`` or ``SURVIVED``.
Exits 1 if any survived. Not part of `make test`: it takes about half a minute for each.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """One remedy: where it is, what stands there without it, and the test that needs it."""

    file: str
    old: str
    new: str
    test: str


TRAPS = "tests/engine/test_traps.py::"
TRANSCODERS = "tests/engine/test_transcoders.py::"
SPLIT_OPS = "tests/steering/test_split_ops.py::"
SPLIT_STATE = "tests/steering/test_split_state.py::"
CUTS = (
    "tests/steering/test_gates.py::"
    "test_a_condition_does_not_depend_on_how_the_sequence_was_cut_into_passes"
)
COMPILED = (
    "tests/engine/test_compiled.py::test_a_graph_compiled_without_saes_or_with_others_is_not_reused"
)
MUTATIONS = {
    "prefix cache unsalted": Mutation(
        "steering/vllm/door.py",
        "request.cache_salt = cache_salt(",
        "_ = cache_salt(",
        TRAPS + "test_blocks_of_a_steered_request_are_never_served_to_a_clean_one",
    ),
    "salt without the prompt's length": Mutation(
        "steering/request/cache_salt.py",
        "prompt_len if spec.phase_dependent else None",
        "None",
        TRAPS + "test_a_generated_turn_is_not_taken_for_a_prompt_of_the_next_one",
    ),
    "salt without the user's own": Mutation(
        "steering/request/cache_salt.py",
        "        user_salt,\n    ]",
        "    ]",
        TRAPS + "test_a_users_own_salt_keeps_parting_requests",
    ),
    "read served from the prefix cache": Mutation(
        "steering/vllm/door.py",
        "params.skip_reading_prefix_cache = True",
        "pass",
        TRAPS + "test_a_read_sees_prompt_tokens_that_the_prefix_cache_holds",
    ),
    "configuration outside the compile hash": Mutation(
        "steering/vllm/engine_arguments.py",
        '"additional_config": {CONFIG_KEY: {**config.to_dict(), "hook_points": hook_points}},',
        # Empty to vLLM's hash, as plain vLLM's is, and yet readable.
        '"additional_config": type("Unhashed", (__import__("collections").UserDict,), '
        '{"__bool__": lambda self: False, "compute_hash": lambda self: ""})'
        "({CONFIG_KEY: config.to_dict()}),",
        COMPILED,
    ),
    "hook points outside the compile hash": Mutation(
        "steering/vllm/engine_arguments.py",
        '{**config.to_dict(), "hook_points": hook_points}',
        "config.to_dict()",
        COMPILED,
    ),
    "rows of the batch in the scheduler's order": Mutation(
        "steering/vllm/runner_v1.py",
        "runner.input_batch.req_ids[:num_reqs],\n",
        "sorted(runner.input_batch.req_ids[:num_reqs]),\n",
        TRAPS + "test_requests_keep_their_own_edits_while_the_batch_is_reordered_by_churn",
    ),
    "phase by the number of scheduled tokens": Mutation(
        "steering/worker/ops/cpu_kernel.py",
        "needed_coverage(position, prompt_len[slot], special)",
        "needed_coverage(0 if token and token_slot[token - 1] == slot else prompt_len[slot], "
        "prompt_len[slot], special)",
        TRAPS + "test_phase_follows_positions_whatever_the_chunks_of_the_prefill[7]",
    ),
    "resumed requests forgotten": Mutation(
        "steering/vllm/runner_v1.py",
        "    for req_id in resumed:\n        if req_id in plans:\n            state.add_request(",
        "    for req_id in ():\n        if req_id in plans:\n            state.add_request(",
        TRAPS + "test_preempted_requests_have_the_right_phases_and_are_counted_once",
    ),
    "a slot keeps the last request's edits": Mutation(
        "steering/worker/slots.py",
        "n, had = len(edits), int(self.count_np[slot])\n",
        "n, had = len(edits), int(self.count_np[slot])\n        if n < had:\n            return\n",
        TRAPS + "test_a_reused_slot_keeps_nothing_of_the_last_request",
    ),
    "children of n share one record": Mutation(
        "steering/vllm/door.py",
        "if plan.children > 1 else 0",
        "if False else 0",
        TRAPS + "test_every_child_of_n_choices_is_steered_and_reported",
    ),
    "an aborted request keeps its slot": Mutation(
        "steering/worker/worker_state.py",
        "self.slots.give_back(request.slot)",
        "pass",
        TRAPS + "test_an_aborted_request_frees_its_slot_and_rows_and_leaves_neighbours_alone",
    ),
    "the first token is steered": Mutation(
        "steering/worker/ops/cpu_kernel.py",
        "special = position == 0 or is_special[input_ids[token]]",
        "special = is_special[input_ids[token]]",
        TRAPS + "test_the_first_token_is_left_alone_unless_special_tokens_are_asked_for",
    ),
    "sinks are steered": Mutation(
        "steering/worker/ops/cpu_kernel.py",
        "sink = norm > param[P_SINK] and",
        "sink = norm < ZERO and",
        TRAPS + "test_sinks_are_neither_edited_nor_read_and_are_counted",
    ),
    "more rows let in than fit": Mutation(
        "steering/vllm/scheduler.py",
        "if len(self._row_users) + new_rows > self._max_rows:",
        "if False:",
        TRAPS + "test_requests_whose_rows_do_not_fit_wait_and_all_are_steered",
    ),
    "a slot keeps what the last request's conditions found": Mutation(
        "steering/worker/gates.py",
        "self.first_held[slot].fill_(NEVER)",
        "pass",
        CUTS,
    ),
    "conditions end at the chunk": Mutation(
        "steering/worker/gates.py",
        "first.masked_fill(anew, NEVER)",
        "first.masked_fill(first >= 0, NEVER)",
        CUTS,
    ),
    "what a rejected token fulfilled stays": Mutation(
        "steering/worker/gates.py",
        "first.masked_fill(anew, NEVER)",
        "first",
        "tests/steering/test_gates.py::test_what_a_rejected_token_fulfilled_is_forgotten",
    ),
    "a slot has the last request's hook points": Mutation(
        "steering/worker/hooks_at_work.py",
        "        self._laid_out = None\n\n    def begin",
        "\n    def begin",
        "tests/steering/test_worker_state.py::"
        "test_a_slot_that_another_request_took_over_is_edited_at_its_own_hook_points",
    ),
    "preempted requests lose what their prompt decided": Mutation(
        "steering/worker/worker_state.py",
        "self._paused_gates[req_id] = self._gate_state.saved(request.slot)",
        "pass",
        "tests/steering/test_worker_state.py::test_a_prompts_decision_survives_a_preemption_where_"
        "it_is_read_at_a_later_layer",
    ),
    "a replay for nobody finds the last pass's slots": Mutation(
        "steering/worker/worker_state.py",
        "self.step.end(wipe=self._always_launch and self._gated.in_pass)",
        "self.step.end()",
        "tests/steering/test_worker_state.py::"
        "test_where_graphs_hold_the_op_a_gated_pass_leaves_no_slot_behind",
    ),
    "sinks are judged where an edit is added": Mutation(
        "steering/worker/ops/cpu_kernel.py",
        "if ints[slot, i, E_FLAGS] & CARRIED:  # judged where it was read",
        "if False:",
        SPLIT_OPS + "test_a_sink_is_judged_where_it_is_read[cpu]",
    ),
    "an edit is read where it is added": Mutation(
        "steering/worker/site.py",
        "carried=carried,",
        "",
        SPLIT_STATE + "test_a_condition_between_the_reading_and_the_writing_decides[kernel]",
    ),
    "every place is written with the first one's rows": Mutation(
        "steering/worker/site.py",
        "index: sae.card.writes.index(self.hook)",
        "index: 0",
        SPLIT_STATE
        + "test_a_cross_layer_transcoder_edits_every_later_place_with_rows_of_its_own[kernel]",
    ),
    "the self-check counts what no read covers, where a transcoder writes": Mutation(
        "steering/worker/full_path.py",
        "output.covered[token],",
        "output.covered[token] | True,",
        SPLIT_STATE + "test_the_self_check_holds_the_reconstruction_against_what_stands_where_it_"
        "writes[kernel]",
    ),
    "read before a norm's gain as it comes": Mutation(
        "steering/worker/ops/cpu_reads.py",
        "input_normed(x, norm_kind, norm_eps)",
        "pass",
        TRANSCODERS + "test_edits_are_read_where_it_reads_and_added_where_it_writes[gemma3-jump]",
    ),
    "a read-only place is called before edits there": Mutation(
        "steering/vllm/hook_points.py",
        "return [*reversed(before),",
        "return [*before,",
        "tests/steering/test_hook_points.py::"
        "test_points_at_one_place_are_called_in_the_order_of_the_stream",
    ),
    "rows of several places are counted as one": Mutation(
        "steering/request/plan.py",
        "for write in range(edit.writes)",
        "for write in range(1)",
        SPLIT_STATE
        + "test_a_cross_layer_transcoder_edits_every_later_place_with_rows_of_its_own[kernel]",
    ),
    "the whole stream is written back": Mutation(
        "steering/worker/ops/cpu_kernel.py",
        "count[slot] == 0:\n",
        "count[slot] == 0:\n                hidden[token * hidden_stride] += np.float32(1e-6)\n",
        TRAPS + "test_unsteered_requests_are_exactly_those_of_plain_vllm_in_the_same_batch",
    ),
}


def caught(mutation: Mutation) -> bool:
    """Whether the trap's test fails without its remedy."""
    with tempfile.TemporaryDirectory() as folder:
        for package in ("sae", "steering", "server", "tests", "pyproject.toml"):
            source = ROOT / package
            target = Path(folder) / package
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        file = Path(folder) / mutation.file
        text = file.read_text()
        assert text.count(mutation.old) == 1, f"{mutation.file}: {mutation.old!r}"
        file.write_text(text.replace(mutation.old, mutation.new))
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.test],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert finished.returncode in (0, 1), finished.stdout[-2000:] + finished.stderr[-2000:]
        return finished.returncode == 1


def main() -> int:
    """Run the named mutations, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MUTATIONS)}")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in MUTATIONS]:
        parser.error(f"no mutation is named {unknown[0]!r}")
    survived = 0
    for name in names or MUTATIONS:
        noticed = caught(MUTATIONS[name])
        survived += not noticed
        print(f"{'caught' if noticed else 'SURVIVED':9} {name}", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
