"""Every version of the edit under one signature, for tests that run them all.

The Triton version takes part where Triton's interpreter is on, which has to be settled before
Triton is imported: ``test_triton_kernel.py`` runs the tests again that way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from steering.worker.batch_work import SlotWork
from steering.worker.ops import cpu_kernel, reference
from steering.worker.ops.buffers import BoundKernel, Buffers
from steering.worker.pass_reports import PassReports
from steering.worker.residency import Residency
from steering.worker.site import Site
from steering.worker.step import Step
from steering.worker.whole_outputs import WholeOutputs
from tests.steering.batches import Batch


@dataclass
class Edited:
    """What one version made of a batch.

    Attributes:
        hidden: the stream.
        buffers: what it was given, written to.
    """

    hidden: Tensor
    buffers: Buffers

    def __iter__(self) -> Iterator[Tensor]:
        """Hidden states, activations and counters."""
        return iter((self.hidden, self.buffers.f, self.buffers.counters))


Version = Callable[[Batch], Edited]


def copied(x: Tensor) -> Tensor:
    """A copy with the same strides, which ``clone`` keeps only for dense tensors."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def run(bound: Callable[[Buffers], BoundKernel], batch: Batch) -> Edited:
    """Edit a copy of the batch by one version: conditions, what is read, what is added."""
    hidden = copied(batch.hidden_states)
    residual = None if batch.residual is None else batch.residual.clone()
    buffers = batch.buffers()
    kernel = bound(buffers)
    kernel.read_gates(hidden, residual)
    if batch.elsewhere:
        kernel.read_edits(hidden, residual)
    assert torch.equal(bits(hidden), bits(batch.hidden_states))
    kernel.steer(hidden, residual)
    if residual is not None and batch.residual is not None:
        assert torch.equal(residual, batch.residual)
    return Edited(hidden, buffers)


def bits(x: Tensor) -> Tensor:
    """The bits of floats, which NaN does not hide."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def bound_reference(buffers: Buffers) -> BoundKernel:
    return BoundKernel(
        partial(reference.read_gates, buffers=buffers),
        partial(reference.read_edits, buffers=buffers),
        partial(reference.steer_tokens, buffers=buffers),
    )


def by_reference(batch: Batch) -> Edited:
    return run(bound_reference, batch)


def by_site(batch: Batch) -> Edited:
    """The batched torch version, as a hook point runs it."""
    hidden, buffers = copied(batch.hidden_states), batch.buffers()
    nowhere = Residency({}, torch.device("cpu"), None)
    hook = "blocks.0.hook_resid_post"
    site = Site(hook, {}, {}, buffers, nowhere, PassReports(), WholeOutputs())
    for slot in range(batch.prompt_len.shape[0]):
        edits, gates = batch.edits.get(slot, ()), batch.gates.get(slot)
        elsewhere = batch.elsewhere.get(slot, {})
        if edits or gates or elsewhere:
            site.work[slot] = SlotWork(
                list(enumerate(edits)),
                [] if gates is None else list(enumerate(gates.gates)),
                frozenset(),
                None,
                None,
                int(batch.prompt_len[slot]),
                None,
                elsewhere=[*elsewhere.items()],
            )
    step = Step(batch.num_tokens, batch.positions, batch.input_ids, "cpu")
    real = int((batch.positions < 2**31).sum())
    step.begin(batch.token_slot[:real].numpy(), torch.arange(real + 1).numpy())
    if step.active:
        site.apply(hidden, batch.residual, step)
    return Edited(hidden, buffers)


def by_cpu_kernel(batch: Batch) -> Edited:
    if not cpu_kernel.edits(batch.hidden_states.dtype):
        pytest.skip("the CPU kernel edits float32 and bfloat16 streams")
    return run(cpu_kernel.bound, batch)


def by_triton_kernel(batch: Batch) -> Edited:
    from steering.worker.ops import triton_kernel

    return run(triton_kernel.bound, batch)


FAST: dict[str, Version] = {"batched": by_site, "cpu": by_cpu_kernel}
if os.environ.get("TRITON_INTERPRET") == "1":
    FAST = {"triton": by_triton_kernel}

versions = pytest.mark.parametrize(
    "version", [pytest.param(v, id=k) for k, v in ({"reference": by_reference} | FAST).items()]
)
fast_versions = pytest.mark.parametrize("version", [pytest.param(v, id=k) for k, v in FAST.items()])

#: Strategies of random batches: the options of `batches.random_batch`, and its seed.
TABLES: Final[dict[str, st.SearchStrategy[Any]]] = {
    "seed": st.integers(0, 2**32 - 1),
    "d_in": st.integers(2, 40),
    "tokens": st.lists(st.integers(0, 3), min_size=1, max_size=3),
    "steered": st.sampled_from([0.0, 0.7, 1.0]),
    "max_edits": st.integers(0, 9),
    "max_gates": st.sampled_from([0, 3, 8]),
    "padding": st.integers(0, 2),
    "residual": st.booleans(),
}


def assert_agrees(version: Version, batch: Batch) -> Edited:
    """Same stream to rounding, same report, same counters; rows without an edit bit for bit."""
    made, expected = version(batch), by_reference(batch)
    hidden, wanted = made.hidden, expected.hidden
    # Sums have another order, and the one rounding to the stream's dtype may fall either way.
    unit = torch.finfo(wanted.dtype).eps
    error = (hidden.float() - wanted.float()).abs()
    scale = wanted.float().norm(dim=1, keepdim=True)
    assert (error <= 2 * unit * wanted.float().abs() + 2e-6 * scale).all(), error.max()
    left, right = made.buffers, expected.buffers
    torch.testing.assert_close(left.f, right.f, rtol=1e-5, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(left.share, right.share, rtol=1e-4, atol=1e-5)
    if left.carried is not None and right.carried is not None:
        torch.testing.assert_close(left.carried, right.carried, rtol=1e-5, atol=1e-4)
    assert torch.equal(left.counters, right.counters)
    assert torch.equal(left.gate_state.events, right.gate_state.events)
    assert torch.equal(left.gate_state.first_held, right.gate_state.first_held)
    untouched = (wanted == batch.hidden_states).all(dim=1)
    assert torch.equal(hidden[untouched], batch.hidden_states[untouched])
    return made
