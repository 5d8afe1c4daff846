"""The Triton kernel on a CUDA device, against the reference on the CPU; and under CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any, Final

import pytest
import torch

from steering.worker.ops import triton_kernel
from steering.worker.ops.buffers import Buffers, InputNorm
from steering.worker.ops.layout import INPUT_RMS, NO_SLOT, P_BIAS
from tests.gpu.device import DEVICE, captured, sizes
from tests.steering.batches import Batch, full_batch, pool, random_batch, split_batch
from tests.steering.versions import Edited, assert_agrees, by_reference, run

pytestmark = pytest.mark.gpu

RAGGED = (7, 1, 0, 3, 1, 1, 5)
CROWDED: Final[dict[str, Any]] = {
    **{"tokens": RAGGED, "steered": 0.8, "padding": 3},
    **{"max_edits": 16, "max_gates": 8},
}
#: On a pre-activation, more than rounding of a float32 sum can be: streams here have norms of up to
#: 20 * (2 * 8192)^0.5, and rows of about 1.
NEAR: Final = 5e-4


def on_device(batch: Batch) -> Edited:
    made = run(triton_kernel.bound, batch.on(DEVICE))
    return Edited(made.hidden.cpu(), back(made.buffers))


def back(buffers: Buffers) -> Buffers:
    """What a kernel writes, on the CPU."""
    state = copy(buffers.gate_state)
    state.events, state.first_held = state.events.cpu(), state.first_held.cpu()
    return buffers._replace(
        f=buffers.f.cpu(),
        share=buffers.share.cpu(),
        carried=None if buffers.carried is None else buffers.carried.cpu(),
        counters=buffers.counters.cpu(),
        gate_state=state,
    )


def assert_agree(batch: Callable[[int], Batch]) -> None:
    """Hold batches on the device against the reference, by seeds whose batches are clear."""
    for seed in sizes(0, 1, 2):
        made = next(made for made in map(batch, range(seed, 1000, 100)) if is_clear(made))
        assert_agrees(on_device, made)


def is_clear(batch: Batch) -> bool:
    """Whether no pre-activation is so near to a threshold that the order of a sum decides.

    It is if `NEAR` more or less on each of them decides nothing otherwise.
    """
    decided = []
    for change in (-NEAR, NEAR):
        params = batch.rows.params.clone()
        params[:, P_BIAS] += change
        changed = replace(batch, rows=pool(batch.rows.W_enc, batch.rows.W_dec, params))
        buffers = by_reference(changed).buffers
        state = buffers.gate_state
        decided.append((buffers.counters, state.events, state.first_held, buffers.f == 0))
    return all(map(torch.equal, *decided))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_in", sizes(24, 576, 1000, 2048, 2304, 4096, 5120, 8192))
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "sum"])
def test_device_agrees_with_the_reference(d_in: int, dtype: torch.dtype, residual: bool) -> None:
    options: dict[str, Any] = {"d_in": d_in, "dtype": dtype, "residual": residual}
    assert_agree(lambda seed: random_batch(seed, **options, **CROWDED))


@pytest.mark.parametrize("norm", [None, InputNorm(INPUT_RMS, 1e-5)], ids=["plain", "rms"])
@pytest.mark.parametrize("d_in", sizes(24, 576, 2304, 4096, 8192))
def test_both_halves_agree_with_the_reference_on_the_device(
    d_in: int, norm: InputNorm | None
) -> None:
    options: dict[str, Any] = {"norm": norm, "d_in": d_in, "dtype": torch.bfloat16}
    assert_agree(lambda seed: split_batch(seed, **options, **CROWDED))


@pytest.mark.parametrize("d_in", sizes(24, 576, 4096, 8192))
def test_sixty_four_edits_agree_on_the_device(d_in: int) -> None:
    assert_agree(lambda seed: full_batch(seed, d_in, torch.bfloat16, tokens=9))


@pytest.mark.parametrize("d_in", sizes(24, 1152, 2304, 8192))
def test_wide_streams_of_compiled_graphs_agree_on_the_device(d_in: int) -> None:
    # Hidden states in float32 beside a residual in the model's dtype: `registered.steer_wide`.
    def batch(seed: int) -> Batch:
        made = random_batch(seed, d_in=d_in, **CROWDED)
        assert made.residual is not None
        return replace(made, residual=made.residual.bfloat16())

    assert_agree(batch)


def test_same_input_gives_the_same_bits_every_time() -> None:
    d_in = sizes(24, 4096)[-1]
    batch = random_batch(5, d_in=d_in, dtype=torch.bfloat16, tokens=RAGGED, max_edits=16)
    first, *_ = on_device(batch)
    for _ in sizes(0, 1, 2, 3, 4):
        again, *_ = on_device(batch)
        assert torch.equal(first, again)


def tensors(batch: Batch, buffers: Buffers) -> Iterator[torch.Tensor]:
    """All that a launch reads or writes, in one order."""
    assert batch.residual is not None
    yield from (batch.hidden_states, batch.residual)
    for part in buffers:
        if isinstance(part, torch.Tensor):
            yield part
        else:  # a table, if it has attributes; else a number
            held = getattr(part, "__dict__", {}).values()
            yield from (tensor for tensor in held if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("d_in", sizes(24, 576, 4096))
def test_captured_launch_follows_slots_tables_and_streams_written_later(d_in: int) -> None:
    # As vLLM does it: captured over a padded batch in which no token has a slot, then replayed.
    batches = [
        split_batch(
            seed,
            d_in=d_in,
            dtype=torch.bfloat16,
            tokens=(4, 2, 3),
            steered=1.0,
            max_gates=4,
            padding=2,
        )
        for seed in range(4)
    ]
    held = batches[0].on(DEVICE)
    buffers = replace(held, edits={}, gates={}, elsewhere={}).buffers()
    buffers.token_slot.fill_(NO_SLOT)

    kernel = triton_kernel.bound(buffers)

    def launch() -> None:
        kernel.read_gates(held.hidden_states, held.residual)
        kernel.read_edits(held.hidden_states, held.residual)
        kernel.steer(held.hidden_states, held.residual)

    launch()  # compiles; a capture may not
    replay = captured(launch)
    assert buffers.counters.tolist() == [0, 0]

    def replayed(batch: Batch) -> Edited:
        for target, source in zip(tensors(held, buffers), tensors(batch, batch.buffers()),
                                  strict=True):  # fmt: skip
            target.copy_(source)
        replay()
        return Edited(held.hidden_states.cpu(), back(buffers))

    nothing = replace(batches[1], edits={}, gates={}, elsewhere={})
    for batch in (*batches, nothing, batches[2]):
        assert_agrees(replayed, batch)
