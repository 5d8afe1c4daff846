"""A direction's activation has either sign and no threshold: every version of the edit, by hand."""

from __future__ import annotations

import pytest
import torch

from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    GATE_ABOVE,
    GATE_BELOW,
    OP_ADD,
    OP_CAP,
    OP_CLAMP,
    OP_FLOOR,
    OP_SCALE,
    SCOPE_TOKEN,
    PlannedGate,
)
from steering.worker.ops.layout import P_THRESHOLD
from steering.worker.rows import RowPool
from tests.steering.batches import Gates, edit, full_batch, one_request, plain_params, pool
from tests.steering.versions import Version, assert_agrees, fast_versions, versions

EVERYWHERE = COVERS_PROMPT | COVERS_GENERATION
#: Of length 1.
U = torch.tensor([[0.6, 0.8]])


def direction() -> RowPool:
    params = plain_params(1)
    params[0, P_THRESHOLD] = -torch.inf
    return pool(U, U, params)


@versions
@pytest.mark.parametrize(
    ("op", "value", "wanted"),
    [
        (OP_CLAMP, 0.0, [0.0, 0.0]),
        (OP_CLAMP, -2.0, [-2.0, -2.0]),
        (OP_SCALE, 3.0, [15.0, -15.0]),
        (OP_ADD, 10.0, [15.0, 5.0]),
        (OP_FLOOR, -2.0, [5.0, -2.0]),
        (OP_FLOOR, -7.0, [5.0, -5.0]),
        (OP_CAP, -2.0, [-2.0, -5.0]),
        (OP_CAP, 2.0, [2.0, -5.0]),
    ],
)
@pytest.mark.parametrize("reread", [False, True])
def test_each_operation_sets_the_projection(
    version: Version, op: int, value: float, wanted: list[float], reread: bool
) -> None:
    # Projections 5 and -5. Read again, it is what was asked for, solved for or not: u . u = 1.
    x = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    rows, edits = direction(), [edit(0, op, value, EVERYWHERE)]
    hidden, f, _ = version(one_request(x, edits, rows, reread=reread))
    torch.testing.assert_close(f[:, 0], torch.tensor([5.0, -5.0]))
    torch.testing.assert_close(hidden @ U[0], torch.tensor(wanted))


@versions
def test_conditions_see_its_sign(version: Version) -> None:
    x = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    for kind, open_at in ((GATE_ABOVE, 0), (GATE_BELOW, 1)):
        gates = Gates([PlannedGate(0, 0, kind, 0.0, SCOPE_TOKEN)])
        edits = [edit(0, OP_ADD, 10.0, EVERYWHERE, gates=1)]
        hidden, _, _ = version(one_request(x, edits, direction(), gates=gates))
        changed = (hidden != x).any(dim=1)
        assert changed.tolist() == [place == open_at for place in (0, 1)]


@fast_versions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_directions_agree(version: Version, dtype: torch.dtype) -> None:
    batch = full_batch(3, 96, dtype, tokens=2)
    batch.rows.params[:, P_THRESHOLD] = -torch.inf
    assert_agrees(version, batch)
