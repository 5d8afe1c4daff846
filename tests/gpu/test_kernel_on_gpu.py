"""The Triton kernel on a CUDA device, against the reference on the CPU; and under CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steering.request.limits import MAX_INTERVENTIONS
from steering.worker.ops import triton_kernel
from steering.worker.slots import NO_SLOT
from tests.steering.batches import Batch, full_batch, random_batch
from tests.steering.test_ops import Edited, assert_agrees, run

pytestmark = pytest.mark.gpu

RAGGED = (7, 1, 0, 3, 1, 1, 5)


def on_device(batch: Batch) -> Edited:
    hidden, report_f, counters = run(triton_kernel.steer_tokens, batch.on("cuda"))
    return hidden.cpu(), report_f.cpu(), counters.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_in", [24, 576, 1000, 2048, 2304, 4096, 5120, 8192])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "sum"])
def test_device_agrees_with_the_reference(d_in: int, dtype: torch.dtype, residual: bool) -> None:
    for seed in range(3):
        batch = random_batch(
            seed, d_in=d_in, dtype=dtype, residual=residual, tokens=RAGGED, steered=0.8,
            max_edits=16, padding=3,
        )  # fmt: skip
        assert_agrees(on_device, batch)


@pytest.mark.parametrize("d_in", [576, 4096, 8192])
def test_sixty_four_edits_agree_on_the_device(d_in: int) -> None:
    assert_agrees(on_device, full_batch(0, d_in, torch.bfloat16, tokens=9))


def test_same_input_gives_the_same_bits_every_time() -> None:
    batch = random_batch(5, d_in=4096, dtype=torch.bfloat16, tokens=RAGGED, max_edits=16)
    first, *_ = on_device(batch)
    for _ in range(5):
        again, *_ = on_device(batch)
        assert torch.equal(first, again)


@pytest.mark.parametrize("d_in", [576, 4096])
def test_captured_launch_follows_slots_tables_and_streams_written_later(d_in: int) -> None:
    # As vLLM does it: captured over a padded batch in which no token has a slot, then replayed.
    batches = [
        random_batch(
            seed, d_in=d_in, dtype=torch.bfloat16, tokens=(4, 2, 3), steered=1.0, padding=2
        )
        for seed in range(4)
    ]
    held = batches[0].on("cuda")
    table = replace(held, edits={}).table()
    report_f = torch.zeros(held.num_tokens, MAX_INTERVENTIONS, device="cuda")
    counters = torch.zeros(2, dtype=torch.int64, device="cuda")
    held.token_slot.fill_(NO_SLOT)

    def launch() -> None:
        triton_kernel.steer_tokens(
            held.hidden_states, held.residual, held.token_slot, held.positions, held.input_ids,
            held.is_special, held.prompt_len, table, held.rows, report_f, held.reports, counters,
        )  # fmt: skip

    launch()  # compiles; a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    assert counters.tolist() == [0, 0]

    def replayed(batch: Batch) -> Edited:
        for name, target in vars(held).items():
            if isinstance(target, torch.Tensor):
                target.copy_(getattr(batch, name))
        for target, source in (
            (held.rows.W_enc, batch.rows.W_enc),
            (held.rows.W_dec, batch.rows.W_dec),
            (held.rows.params, batch.rows.params),
        ):
            target.copy_(source)
        for slot in range(held.prompt_len.shape[0]):
            edits = batch.edits.get(slot, ())
            table.write(slot, edits, [edit.latent for edit in edits])
        report_f.fill_(7.0)  # test_ops.UNWRITTEN
        counters.zero_()
        graph.replay()
        return held.hidden_states.cpu(), report_f.cpu(), counters.cpu()

    for batch in (*batches, replace(batches[1], edits={}), batches[2]):
        assert_agrees(replayed, batch)
