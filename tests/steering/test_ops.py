"""Every version of the edit against numbers worked by hand, and against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    COVERS_SINKS,
    COVERS_SPECIAL,
    OP_ADD,
    OP_CAP,
    OP_CLAMP,
    OP_FLOOR,
    OP_SCALE,
)
from steering.worker.ops.layout import (
    NO_SLOT,
    NORM_CONSTANT,
    NORM_LAYER,
    P_BIAS,
    P_DECODER_SCALE,
    P_GATE_BIAS,
    P_NORM,
    P_SINK,
    P_THRESHOLD,
    SKIPPED_SINK,
)
from steering.worker.rows import RowPool
from tests.steering.batches import (
    RAGGED,
    UNWRITTEN,
    edit,
    full_batch,
    one_request,
    plain_params,
    pool,
    random_batch,
)
from tests.steering.versions import TABLES, Version, assert_agrees, fast_versions, versions

EVERYWHERE = COVERS_PROMPT | COVERS_GENERATION


# --- against the reference ------------------------------------------------------------------------


@fast_versions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_in", [2, 24, 576, 1000, 2304])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "sum"])
def test_ragged_batches_agree(
    version: Version, d_in: int, dtype: torch.dtype, residual: bool
) -> None:
    batch = random_batch(d_in, d_in=d_in, dtype=dtype, residual=residual, **RAGGED)
    _, _, counters = assert_agrees(version, batch)
    assert counters[0] > 0


@fast_versions
@settings(max_examples=40)
@given(**TABLES)
def test_random_tables_agree(version: Version, seed: int, **options: Any) -> None:
    assert_agrees(version, random_batch(seed, **options))


@fast_versions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sixty_four_edits_agree(version: Version, dtype: torch.dtype) -> None:
    assert_agrees(version, full_batch(3, 96, dtype, tokens=2))


@fast_versions
def test_batch_without_tokens_agrees(version: Version) -> None:
    assert_agrees(version, random_batch(0, tokens=(0,), padding=0))


@fast_versions
def test_batch_of_nothing_but_padding_agrees(version: Version) -> None:
    assert_agrees(version, random_batch(0, tokens=(0,), padding=3))


# --- by hand --------------------------------------------------------------------------------------

# One latent reads the stream's first coordinate and writes the second, with decoder scale 1.
READ_FIRST, WRITE_SECOND = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


def simple_rows(**params: float) -> RowPool:
    """The pool of that latent; ``params`` by the name of their column."""
    columns = {
        "bias": P_BIAS, "threshold": P_THRESHOLD, "gate_bias": P_GATE_BIAS, "sink": P_SINK,
        "norm": P_NORM, "decoder_scale": P_DECODER_SCALE,
    }  # fmt: skip
    found = plain_params(1)
    for name, value in params.items():
        found[0, columns[name]] = value
    return pool(READ_FIRST, WRITE_SECOND, found)


def stream(*first: float) -> Tensor:
    """Tokens ``[first, 0.5]``."""
    return torch.tensor([[f, 0.5] for f in first])


@versions
@pytest.mark.parametrize(
    ("op", "value", "changes"),
    [
        (OP_CLAMP, 10.0, [7.0, 10.0]),
        (OP_CLAMP, 0.0, [-3.0, 0.0]),
        (OP_SCALE, 3.0, [6.0, 0.0]),
        (OP_ADD, 10.0, [10.0, 10.0]),
        (OP_FLOOR, 2.0, [0.0, 2.0]),
        (OP_FLOOR, 4.0, [1.0, 4.0]),
        (OP_CAP, 2.0, [-1.0, 0.0]),
        (OP_CAP, 4.0, [0.0, 0.0]),
    ],
)
def test_each_operation_changes_the_activation_as_it_says(
    version: Version, op: int, value: float, changes: list[float]
) -> None:
    # The first token's activation is 3, the second's 0: ReLU of -3.
    batch = one_request(stream(3.0, -3.0), [edit(0, op, value, EVERYWHERE)], simple_rows())
    hidden, report_f, counters = version(batch)
    assert hidden.tolist() == [[3.0, 0.5 + changes[0]], [-3.0, 0.5 + changes[1]]]
    assert report_f[:, 0].tolist() == [3.0, 0.0]
    assert counters.tolist() == [2, 0]


@versions
def test_latent_at_threshold_stays_silent(version: Version) -> None:
    rows = simple_rows(threshold=2.0, bias=1.0)
    batch = one_request(stream(1.0, 1.5), [edit(0, OP_SCALE, 0.0, EVERYWHERE)], rows)
    hidden, report_f, _ = version(batch)
    assert report_f[:, 0].tolist() == [0.0, 2.5]
    assert hidden[:, 1].tolist() == [0.5, -2.0]


@versions
def test_closed_gate_silences_a_latent(version: Version) -> None:
    rows = simple_rows(gate_bias=-2.0)
    batch = one_request(stream(1.0, 2.0, 2.5), [edit(0, OP_CLAMP, 1.0, EVERYWHERE)], rows)
    _, report_f, _ = version(batch)
    assert report_f[:, 0].tolist() == [0.0, 0.0, 2.5]


@versions
def test_edits_read_the_stream_as_it_came(version: Version) -> None:
    # The first latent writes what the second reads; the second must not see it.
    rows = pool(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), plain_params(2))
    edits = [edit(0, OP_ADD, 100.0, EVERYWHERE), edit(1, OP_SCALE, 3.0, EVERYWHERE)]
    hidden, report_f, _ = version(one_request(torch.tensor([[1.0, 2.0]]), edits, rows))
    assert report_f[0, :2].tolist() == [1.0, 2.0]
    assert hidden.tolist() == [[1.0 + 2 * 2.0, 2.0 + 100.0]]


@versions
def test_residual_is_read_but_only_the_hidden_state_is_written(version: Version) -> None:
    batch = one_request(stream(1.0), [edit(0, OP_SCALE, 3.0, EVERYWHERE)], simple_rows())
    hidden, report_f, _ = version(replace(batch, residual=torch.tensor([[4.0, 8.0]])))
    assert report_f[0, 0] == 5.0
    assert hidden.tolist() == [[1.0, 0.5 + 10.0]]


@versions
@pytest.mark.parametrize(
    ("coverage", "edited"),
    [
        (COVERS_PROMPT, [6, 7]),
        (COVERS_GENERATION, [8, 9]),
        (EVERYWHERE, [6, 7, 8, 9]),
    ],
)
def test_phase_is_the_position_against_the_original_prompt(
    version: Version, coverage: int, edited: list[int]
) -> None:
    edits = [edit(0, OP_ADD, 1.0, coverage)]
    batch = one_request(stream(*[1.0] * 4), edits, simple_rows(), first=6, prompt_len=8)
    hidden, _, counters = version(batch)
    assert batch.positions[hidden[:, 1] == 1.5].tolist() == edited
    assert counters.tolist() == [len(edited), 0]


@versions
def test_window_takes_its_start_and_leaves_its_end(version: Version) -> None:
    edits = [edit(0, OP_ADD, 1.0, EVERYWHERE, start=6, end=8)]
    batch = one_request(stream(*[1.0] * 5), edits, simple_rows(), first=5)
    hidden, report_f, _ = version(batch)
    assert hidden[:, 1].tolist() == [0.5, 1.5, 1.5, 0.5, 0.5]
    assert report_f[:, 0].isnan().tolist() == [True, False, False, True, True]


@versions
@pytest.mark.parametrize("coverage", [EVERYWHERE, EVERYWHERE | COVERS_SPECIAL])
def test_special_tokens_and_the_first_are_left_alone_unless_asked_for(
    version: Version, coverage: int
) -> None:
    edits = [edit(0, OP_ADD, 1.0, coverage)]
    batch = one_request(stream(1.0, 1.0, 1.0), edits, simple_rows(), first=0, input_ids=[10, 1, 10])
    hidden, _, _ = version(batch)
    edited = [True] * 3 if coverage & COVERS_SPECIAL else [False, False, True]
    assert (hidden[:, 1] == 1.5).tolist() == edited


@versions
def test_sinks_are_left_alone_and_counted(version: Version) -> None:
    edits = [edit(0, OP_ADD, 1.0, EVERYWHERE)]
    batch = one_request(stream(3.0, 300.0), edits, simple_rows(sink=100.0))
    hidden, report_f, counters = version(batch)
    assert hidden[:, 1].tolist() == [1.5, 0.5]
    assert report_f[:, 0].tolist() == [3.0, SKIPPED_SINK]
    assert counters.tolist() == [1, 1]


@versions
def test_inspection_reaches_sinks(version: Version) -> None:
    edits = [edit(0, OP_SCALE, 1.0, EVERYWHERE | COVERS_SINKS)]
    _, report_f, counters = version(one_request(stream(300.0), edits, simple_rows(sink=100.0)))
    assert report_f[0, 0] == 300.0
    assert counters.tolist() == [1, 0]


@versions
def test_one_token_may_be_edited_by_one_sae_and_kept_from_another(version: Version) -> None:
    params = plain_params(2)
    params[1, P_SINK] = 1.0
    rows = pool(READ_FIRST.repeat(2, 1), WRITE_SECOND.repeat(2, 1), params)
    edits = [edit(0, OP_ADD, 1.0, EVERYWHERE), edit(1, OP_ADD, 50.0, EVERYWHERE)]
    hidden, report_f, counters = version(one_request(stream(3.0), edits, rows))
    assert hidden[0, 1] == 1.5
    assert report_f[0, :2].tolist() == [3.0, SKIPPED_SINK]
    assert counters.tolist() == [1, 1]


@versions
def test_add_does_not_depend_on_the_activation(version: Version) -> None:
    rows = simple_rows()
    rows.W_enc.fill_(torch.nan)
    edits = [edit(0, OP_ADD, 2.0, EVERYWHERE)]
    hidden, _, _ = version(one_request(stream(3.0), edits, rows, reports=False))
    assert hidden.tolist() == [[3.0, 2.5]]


@versions
def test_constant_norm_makes_the_edit_scale_with_the_stream(version: Version) -> None:
    # |x| / sqrt(2) is 5 and 10: the normalized first coordinate is 1.4 in both, the clamp to 3
    # adds 1.6 in the SAE's units.
    x = torch.tensor([[7.0, 1.0], [14.0, 2.0]])
    edits = [edit(0, OP_CLAMP, 3.0, EVERYWHERE)]
    hidden, report_f, _ = version(one_request(x, edits, simple_rows(norm=NORM_CONSTANT)))
    torch.testing.assert_close(report_f[:, 0], torch.tensor([1.4, 1.4]))
    torch.testing.assert_close(hidden, torch.tensor([[7.0, 1 + 8.0], [14.0, 2 + 16.0]]))


@versions
def test_layer_norm_centres_what_is_read_and_scales_what_is_written(version: Version) -> None:
    # Mean 4, unbiased standard deviation sqrt(18): the first coordinate reads as 1/sqrt(2).
    x = torch.tensor([[7.0, 1.0]])
    edits = [edit(0, OP_ADD, 1.0, EVERYWHERE)]
    hidden, report_f, _ = version(one_request(x, edits, simple_rows(norm=NORM_LAYER)))
    torch.testing.assert_close(report_f[0, 0], torch.tensor(0.5**0.5))
    torch.testing.assert_close(hidden, torch.tensor([[7.0, 1 + 18**0.5]]))


@versions
def test_decoder_scale_multiplies_what_is_written(version: Version) -> None:
    edits = [edit(0, OP_CLAMP, 1.0, EVERYWHERE)]
    hidden, _, _ = version(one_request(stream(3.0), edits, simple_rows(decoder_scale=0.25)))
    assert hidden[0, 1] == 0.5 - 2 * 0.25


@versions
def test_delta_is_rounded_once(version: Version) -> None:
    # Half a unit in the last place of 256 in bfloat16, twice: edit by edit it would be lost.
    x = torch.tensor([[3.0, 256.0]], dtype=torch.bfloat16)
    rows = pool(READ_FIRST.repeat(2, 1), WRITE_SECOND.repeat(2, 1), plain_params(2))
    edits = [edit(row, OP_ADD, 1.0, EVERYWHERE) for row in range(2)]
    hidden, _, _ = version(one_request(x, edits, rows))
    assert hidden[0, 1] == 258.0


@versions
@pytest.mark.parametrize("million", [1e6, -1e6])
@pytest.mark.parametrize("residual", [None, 30000.0], ids=str)
def test_edit_keeps_a_float16_stream_and_what_carries_it_far_from_infinity(
    version: Version, residual: float | None, million: float
) -> None:
    hidden = torch.tensor([[3.0, 0.5], [3.0, 40000.0], [3.0, -50000.0]], dtype=torch.float16)
    written = hidden[:, 1].float()
    rest = None if residual is None else torch.full_like(hidden, residual)
    edits = [edit(0, OP_ADD, million, EVERYWHERE)]
    made = version(replace(one_request(hidden, edits, simple_rows()), residual=rest))
    # What is larger than the limit may stay so, no more.
    x = written + (residual or 0.0)
    wanted = x.abs().clamp(min=32768).copysign(torch.tensor(million)) - (residual or 0.0)
    most = written.abs().clamp(min=32768)
    assert torch.equal(made.hidden[:, 1], wanted.clamp(-most, most).half())
    assert torch.equal(made.hidden[:, 0], hidden[:, 0])
    # The share is that of the change that was made.
    change = (made.hidden.float() - hidden.float()).norm(dim=1)
    before = torch.stack([torch.full((3,), 3.0 + (residual or 0.0)), x], dim=1)
    torch.testing.assert_close(made.buffers.share, change / before.norm(dim=1), rtol=1e-3, atol=0)


@versions
@pytest.mark.parametrize("most", [3.0, 65504.0])
def test_edit_that_changes_nothing_leaves_a_float16_stream_bit_for_bit(
    version: Version, most: float
) -> None:
    hidden = torch.tensor([[3.0, most], [3.0, -most]], dtype=torch.float16)
    edits = [edit(0, OP_FLOOR, 1.0, EVERYWHERE)]
    assert torch.equal(version(one_request(hidden, edits, simple_rows())).hidden, hidden)


@versions
def test_report_is_written_only_where_a_slot_reports_and_has_edits(version: Version) -> None:
    edits = [edit(0, OP_ADD, 1.0, EVERYWHERE), edit(0, OP_ADD, 1.0, COVERS_GENERATION)]
    batch = one_request(stream(3.0), edits, simple_rows(), first=5, prompt_len=8)
    _, report_f, _ = version(batch)
    assert report_f[0, 0] == 3.0
    assert report_f[0, 1].isnan()
    assert (report_f[0, 2:] == UNWRITTEN).all()
    _, report_f, _ = version(replace(batch, reports=torch.zeros(1, dtype=torch.int32)))
    assert (report_f == UNWRITTEN).all()


@versions
def test_tokens_without_a_slot_stay_bit_for_bit(version: Version) -> None:
    # Whatever their bits: payloads of NaN and negative zero included.
    bits = torch.tensor([[0x7FC12345, -0x80000000], [0x3F800001, 0x00000001]], dtype=torch.int32)
    batch = one_request(stream(3.0, 3.0), [edit(0, OP_ADD, 1.0, EVERYWHERE)], simple_rows())
    batch = replace(
        batch,
        hidden_states=bits.view(torch.float32),
        token_slot=torch.full((2,), NO_SLOT, dtype=torch.int32),
    )
    hidden, _, counters = version(batch)
    assert torch.equal(hidden.view(torch.int32), bits)
    assert counters.tolist() == [0, 0]


@versions
def test_slot_whose_edits_cover_nothing_here_stays_bit_for_bit(version: Version) -> None:
    x = torch.tensor([[-0.0, 1e-42]])
    batch = one_request(x, [edit(0, OP_ADD, 1.0, COVERS_GENERATION)], simple_rows())
    hidden, _, counters = version(batch)
    assert torch.equal(hidden.view(torch.int32), x.view(torch.int32))
    assert counters.tolist() == [0, 0]


@versions
def test_rows_may_lie_apart_in_memory(version: Version) -> None:
    wide = torch.zeros(3, 5)
    batch = one_request(stream(1.0, 2.0, 3.0), [edit(0, OP_SCALE, 2.0, EVERYWHERE)], simple_rows())
    wide[:, :2] = batch.hidden_states
    expected, _, _ = version(batch)

    strided = replace(batch, hidden_states=wide[:, :2])
    assert strided.hidden_states.stride() == (5, 1)
    hidden, _, _ = version(strided)
    assert torch.equal(hidden, expected)
