"""Edits that are read at one hook point and added at another, in every version of the op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering.request.limits import MAX_INTERVENTIONS
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    GATE_ABOVE,
    OP_ADD,
    OP_CLAMP,
    OP_SCALE,
    SCOPE_TOKEN,
    PlannedGate,
)
from steering.worker.ops.buffers import InputNorm
from steering.worker.ops.layout import (
    HELD_BACK,
    INPUT_LAYER,
    INPUT_RMS,
    NEVER,
    NO_SLOT,
    NORM_CONSTANT,
    P_NORM,
    P_SINK,
    SKIPPED_SINK,
)
from tests.steering.batches import (
    RAGGED,
    UNWRITTEN,
    Batch,
    Gates,
    edit,
    one_request,
    plain_params,
    pool,
    split_batch,
)
from tests.steering.versions import TABLES, Version, assert_agrees, bits, fast_versions, versions

EVERYWHERE = COVERS_PROMPT | COVERS_GENERATION


@fast_versions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_in", [2, 24, 576, 2304])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "sum"])
def test_ragged_batches_agree(
    version: Version, d_in: int, dtype: torch.dtype, residual: bool
) -> None:
    batch = split_batch(d_in, d_in=d_in, dtype=dtype, residual=residual, **RAGGED)
    assert batch.elsewhere and any(batch.was_read.values())
    assert_agrees(version, batch)


@fast_versions
@settings(max_examples=40)
@given(
    **TABLES,
    norm=st.sampled_from([None, InputNorm(INPUT_RMS, 1e-5), InputNorm(INPUT_LAYER, 1e-3)]),
)
def test_random_tables_agree(version: Version, seed: int, **options: Any) -> None:
    assert_agrees(version, split_batch(seed, **options))


# --- by hand --------------------------------------------------------------------------------------

# One latent reads the first of two elements where it reads, and writes the third of three.
ROWS = (torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 2.0]]))
X = torch.tensor([[3.0, 7.0], [-3.0, 7.0]])
Y = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])


def read_half(x: Tensor = X, op: int = OP_CLAMP, value: float = 10.0, **params: float) -> Batch:
    """A pass over the place where the only edit is read."""
    made = plain_params(1)
    for name, number in params.items():
        made[0, {"sink": P_SINK, "norm": P_NORM}[name]] = number
    rows = pool(ROWS[0][:, : x.shape[1]], ROWS[0][:, : x.shape[1]], made)
    batch = one_request(x, [], rows)
    carried = torch.full((len(x), MAX_INTERVENTIONS), UNWRITTEN)
    return replace(batch, elsewhere={0: {5: edit(0, op, value, EVERYWHERE)}}, carried=carried)


def write_half(carried: Tensor | None, y: Tensor = Y, **more: Any) -> Batch:
    """A pass over the place where it is added."""
    # Its own encoder row would read something else, its sink norm forbid all.
    made = plain_params(1)
    made[0, P_SINK] = 0.1
    rows = pool(torch.full((1, 3), torch.nan), ROWS[1], made)
    edits = [edit(0, OP_SCALE, 99.0, EVERYWHERE, **more)]
    return replace(one_request(y, edits, rows), was_read={0: frozenset({0})}, carried=carried)


def carried_by(version: Version, batch: Batch) -> Tensor:
    """What the read half leaves, in the column that `write_half` has its edit in."""
    made = version(batch)
    assert torch.equal(bits(made.hidden), bits(batch.hidden_states))
    left = made.buffers.carried
    assert left is not None
    moved = left.clone()
    moved[:, 0] = left[:, 5]
    return moved


@versions
@pytest.mark.parametrize(
    ("op", "value", "changes"),
    [(OP_CLAMP, 10.0, [7.0, 10.0]), (OP_SCALE, 3.0, [6.0, 0.0]), (OP_ADD, 2.0, [2.0, 2.0])],
)
def test_what_is_read_at_one_place_is_added_at_another(
    version: Version, op: int, value: float, changes: list[float]
) -> None:
    left = carried_by(version, read_half(op=op, value=value))
    hidden, _, counters = version(write_half(left))
    assert hidden.tolist() == [[1.0, 1.0, 1.0 + 2 * change] for change in changes]
    assert counters.tolist() == [2, 0]


@versions
def test_the_read_half_writes_the_report_and_its_own_columns_alone(version: Version) -> None:
    _, f, counters = made = version(read_half())
    assert f[:, 5].tolist() == [3.0, 0.0]
    left = made.buffers.carried
    assert left is not None
    for buffer in (f, left):
        others = torch.arange(buffer.shape[1]) != 5
        assert (buffer[:, others] == UNWRITTEN).all()
    assert counters.tolist() == [0, 0]


@versions
def test_a_sink_is_judged_where_it_is_read(version: Version) -> None:
    # |x| is about 7.6; the second token's is 700.
    x = torch.tensor([[3.0, 7.0], [3.0, 700.0]])
    left = carried_by(version, read_half(x, sink=100.0))
    hidden, f, counters = version(write_half(left))
    assert hidden[:, 2].tolist() == [1.0 + 14.0, 1.0]
    assert f[:, 0].tolist() == [UNWRITTEN, SKIPPED_SINK]
    assert counters.tolist() == [1, 1]


@versions
def test_conditions_are_looked_at_where_the_edit_is_added(version: Version) -> None:
    gate = PlannedGate(0, 0, GATE_ABOVE, 1.0, SCOPE_TOKEN)
    left = carried_by(version, read_half())
    batch = write_half(left, gates=1)
    # The condition was read before, at a hook point in between, and held nowhere.
    batch = replace(batch, gates={0: Gates([gate], [NEVER])}, rows=finite(batch))
    made = version(batch)
    assert made.buffers.f[:, 0].tolist() == [HELD_BACK, HELD_BACK]
    assert torch.equal(bits(made.hidden), bits(batch.hidden_states))


def finite(batch: Batch) -> Any:
    """Rows whose encoder reads zero: so that the batch's own gate does not hold."""
    return pool(torch.zeros(1, 3), ROWS[1], batch.rows.params)


@versions
def test_the_change_is_limited_by_what_stands_where_it_is_added(version: Version) -> None:
    left = carried_by(version, read_half())
    made = version(replace(write_half(left), max_share={0: 0.5}))
    norm = 3**0.5
    torch.testing.assert_close(made.hidden[:, 2], torch.full((2,), 1 + 0.5 * norm))
    assert made.buffers.share.tolist() == [-0.5, -0.5]


@versions
def test_the_scale_of_the_input_norm_is_that_of_where_it_is_read(version: Version) -> None:
    # |x| / sqrt(2) is 5 and the normalized first element 1.4; a clamp to 3 adds 1.6 * 5.
    left = carried_by(version, read_half(torch.tensor([[7.0, 1.0]]), value=3.0, norm=NORM_CONSTANT))
    hidden, _, _ = version(write_half(left, Y[:1]))
    torch.testing.assert_close(hidden, torch.tensor([[1.0, 1.0, 1 + 2 * 1.6 * 5]]))


@versions
@pytest.mark.parametrize(
    ("norm", "first"),
    # Mean square 25 and mean 4: deviations of 3.
    [(InputNorm(INPUT_RMS, 24.0), 1.0), (InputNorm(INPUT_LAYER, 27.0), 0.5)],
)
def test_a_place_behind_a_norm_is_read_normalized(
    version: Version, norm: InputNorm, first: float
) -> None:
    batch = replace(read_half(torch.tensor([[7.0, 1.0]])), input_norm=norm)
    _, f, _ = version(batch)
    assert f[0, 5] == pytest.approx(first)


@versions
def test_edits_of_both_kinds_are_added_and_limited_together(version: Version) -> None:
    rows = pool(torch.eye(3)[:2], torch.eye(3)[1:], plain_params(2))
    edits = [edit(0, OP_ADD, 3.0, EVERYWHERE), edit(1, OP_ADD, 0.0, EVERYWHERE)]
    batch = one_request(torch.tensor([[5.0, 0.0, 0.0]]), edits, rows)
    carried = torch.full((1, MAX_INTERVENTIONS), 4.0)
    batch = replace(batch, was_read={0: frozenset({1})}, carried=carried)
    made = version(batch)
    assert made.hidden.tolist() == [[5.0, 3.0, 4.0]]
    assert made.buffers.share[0] == pytest.approx(1.0)
    assert made.buffers.counters.tolist() == [1, 0]


@versions
def test_padding_and_unsteered_tokens_leave_and_take_nothing(version: Version) -> None:
    nobody = torch.full((2,), NO_SLOT, dtype=torch.int32)
    made = version(replace(read_half(), token_slot=nobody))
    left = made.buffers.carried
    assert left is not None and (left == UNWRITTEN).all()
    hidden = version(replace(write_half(left), token_slot=nobody)).hidden
    assert torch.equal(bits(hidden), bits(Y))


@versions
def test_an_add_leaves_its_value_whatever_the_encoder_row_is(version: Version) -> None:
    batch = read_half(op=OP_ADD, value=2.0)
    batch.rows.W_enc.fill_(torch.nan)
    left = carried_by(version, replace(batch, reports=torch.zeros(1, dtype=torch.int32)))
    assert left[:, 0].tolist() == [2.0, 2.0]
