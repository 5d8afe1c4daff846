"""The Triton kernel in Triton's interpreter, which needs no GPU.

Triton reads TRITON_INTERPRET when it is imported, and another test may have imported it already:
hence a process of its own, which runs this file and the tests that every version passes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.request.limits import MAX_GATES, MAX_INTERVENTIONS
from steering.request.plan import GATE_ABOVE, OP_ADD, OP_CLAMP, SCOPE_TOKEN, PlannedGate
from steering.worker.ops import triton_kernel
from tests.bench.roofline import moved, moved_by_gates, moved_by_reads, moved_by_writes
from tests.steering.batches import Batch, Gates, edit, one_request, plain_params, pool

#: The tests that every version passes.
INTERPRETED_TOO = (
    "test_triton_kernel.py",
    "test_ops.py",
    "test_gates.py",
    "test_split_ops.py",
    "test_direction_ops.py",
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    def test_kernel_passes_every_test_in_the_interpreter() -> None:
        here = Path(__file__)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x"]
        done = subprocess.run(
            [*command, *(str(here.with_name(name)) for name in INTERPRETED_TOO)],
            cwd=here.parents[2],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert done.returncode == 0, done.stdout + done.stderr

else:

    @contextmanager
    def traffic() -> Iterator[list[int]]:
        """Bytes that unmasked lanes load and store, one entry an access."""
        from triton.runtime.interpreter import InterpreterBuilder

        sizes: list[int] = []

        def counting(name: str, pointers: int, mask: int) -> Any:
            original = getattr(InterpreterBuilder, name)

            def access(self: Any, *args: Any) -> Any:
                bits = args[pointers].dtype.scalar.element_ty.primitive_bitwidth
                sizes.append(int(args[mask].data.sum()) * max(bits // 8, 1))
                return original(self, *args)

            return access

        with pytest.MonkeyPatch.context() as patch:
            # Accesses without a mask pass through these, too.
            for name, pointers, mask in (
                ("create_masked_load", 0, 1),
                ("create_masked_store", 0, 2),
                ("create_atomic_rmw", 1, 3),
            ):
                patch.setattr(InterpreterBuilder, name, counting(name, pointers, mask))
            yield sizes

    def edit_alone(batch: Batch) -> None:
        """The edit's launch, without that of the conditions."""
        triton_kernel.steer_tokens(batch.hidden_states.clone(), batch.residual, batch.buffers())

    @pytest.mark.parametrize("edits", [1, 8, MAX_INTERVENTIONS])
    @pytest.mark.parametrize("d_in", [576, 2304])
    @pytest.mark.parametrize("residual", [True, False], ids=["residual", "sum"])
    def test_bytes_moved_are_those_of_the_roofline_and_near_the_minimum(
        d_in: int, edits: int, residual: bool
    ) -> None:
        x = torch.randn(1, d_in, dtype=torch.bfloat16)
        rows = pool(torch.randn(edits, d_in), torch.randn(edits, d_in), plain_params(edits))
        batch = one_request(x, [edit(row, OP_CLAMP, 1.0, 3) for row in range(edits)], rows)
        batch.residual = torch.randn(1, d_in, dtype=torch.bfloat16) if residual else None
        with traffic() as sizes:
            edit_alone(batch)
        expected = moved(d_in, 2, edits, residual=residual)
        assert sum(sizes) == expected.minimum + expected.metadata
        assert expected.ratio < 1.3

    @pytest.mark.parametrize("gates", [1, 5, MAX_GATES])
    @pytest.mark.parametrize("residual", [True, False], ids=["residual", "sum"])
    def test_conditions_move_the_bytes_of_the_roofline(gates: int, residual: bool) -> None:
        x = torch.randn(1, 576, dtype=torch.bfloat16)
        rows = pool(torch.randn(gates, 576), torch.randn(gates, 576), plain_params(gates))
        conditions = [PlannedGate(0, row, GATE_ABOVE, 0.0, SCOPE_TOKEN) for row in range(gates)]
        batch = one_request(x, [], rows, gates=Gates(conditions))
        batch.residual = torch.randn(1, 576, dtype=torch.bfloat16) if residual else None
        with traffic() as sizes:
            triton_kernel.bound(batch.buffers()).read_gates(batch.hidden_states, batch.residual)
        expected = moved_by_gates(576, 2, gates, residual=residual)
        assert sum(sizes) == expected.minimum + expected.metadata

    @pytest.mark.parametrize("edits", [1, 5, MAX_INTERVENTIONS])
    @pytest.mark.parametrize("residual", [True, False], ids=["residual", "sum"])
    def test_halves_move_the_bytes_of_the_roofline(edits: int, residual: bool) -> None:
        x = torch.randn(1, 576, dtype=torch.bfloat16)
        rows = pool(torch.randn(edits, 576), torch.randn(edits, 576), plain_params(edits))
        clamps = [edit(row, OP_CLAMP, 1.0, 3) for row in range(edits)]
        batch = one_request(x, clamps, rows)
        batch.residual = torch.randn(1, 576, dtype=torch.bfloat16) if residual else None
        batch.elsewhere = {0: dict(enumerate(clamps))}
        batch.was_read = {0: frozenset(range(edits))}
        batch.carried = torch.randn(1, MAX_INTERVENTIONS)
        kernel = triton_kernel.bound(batch.buffers())
        for half, count in ((kernel.read_edits, moved_by_reads), (kernel.steer, moved_by_writes)):
            with traffic() as sizes:
                half(batch.hidden_states, batch.residual)
            expected = count(576, 2, edits, residual=residual)
            assert sum(sizes) == expected.minimum + expected.metadata

    def test_without_conditions_their_launch_costs_two_loads_a_token() -> None:
        rows = pool(torch.randn(1, 576), torch.randn(1, 576), plain_params(1))
        batch = one_request(torch.randn(3, 576), [edit(0, OP_CLAMP, 1.0, 3)], rows)
        with traffic() as sizes:
            triton_kernel.bound(batch.buffers()).read_gates(batch.hidden_states, batch.residual)
        assert sizes == [4] * 6

    def test_add_without_a_report_reads_no_encoder_row() -> None:
        x = torch.randn(1, 576, dtype=torch.bfloat16)
        rows = pool(torch.randn(8, 576), torch.randn(8, 576), plain_params(8))
        edits = [edit(row, OP_ADD, 1.0, 3) for row in range(8)]
        with traffic() as sizes:
            edit_alone(one_request(x, edits, rows, reports=False))
        expected = moved(576, 2, 8, residual=False, add=True)
        assert sum(sizes) == expected.minimum + expected.metadata

    def test_token_without_a_slot_costs_one_load() -> None:
        rows = pool(torch.randn(1, 576), torch.randn(1, 576), plain_params(1))
        batch = one_request(torch.randn(3, 576), [edit(0, OP_CLAMP, 1.0, 3)], rows)
        batch.token_slot.fill_(-1)
        with traffic() as sizes:
            edit_alone(batch)
        assert sizes == [4, 4, 4]

    def test_token_that_no_edit_covers_costs_no_stream() -> None:
        rows = pool(torch.randn(1, 576), torch.randn(1, 576), plain_params(1))
        edits = [edit(0, OP_CLAMP, 1.0, 3, start=100)]
        with traffic() as sizes:
            edit_alone(one_request(torch.randn(1, 576), edits, rows))
        assert sum(sizes) < 100
