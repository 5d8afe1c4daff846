"""The edit of one token, spelled out: what every other version must agree with."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.normalization import LAYER_NORM_EPS
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
from steering.worker.rows import (
    NORM_CONSTANT,
    NORM_LAYER,
    P_BIAS,
    P_DECODER_SCALE,
    P_ENC_SUM,
    P_GAIN,
    P_GATE_BIAS,
    P_NORM,
    P_SINK,
    P_THRESHOLD,
    RowPool,
)
from steering.worker.slots import E_COVERAGE, E_END, E_OP, E_ROW, E_START, NO_SLOT, EditTable

#: In `report_f`: an edit that does not cover the token, and one kept off by a sink.
NOT_COVERED, SKIPPED_SINK = float("nan"), float("-inf")


def steer_tokens(
    hidden_states: Tensor,
    residual: Tensor | None,
    token_slot: Tensor,
    positions: Tensor,
    input_ids: Tensor,
    is_special: Tensor,
    prompt_len: Tensor,
    table: EditTable,
    rows: RowPool,
    report_f: Tensor | None = None,
    reports: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    """Add each steered token's delta to ``hidden_states``, in place.

    For a token with stream ``x = hidden_states + residual`` and the edits i that cover it:
    ``hidden_states += sum_i (f'_i - f_i) * s_i * g_i * W_dec[i]``, with ``f_i`` read from ``x``,
    ``s_i`` the decoder scale and ``g_i`` the SAE's output scale where its input is normalised.

    Args:
        hidden_states: ``[num_tokens, d_in]`` model dtype; rows that no edit covers stay as they
            are, bit for bit.
        residual: the same shape, or None where the layer returns the sum; only read.
        token_slot: ``[>= num_tokens]`` int32, slot of each token, NO_SLOT for none.
        positions: ``[>= num_tokens]`` position in the sequence.
        input_ids: ``[>= num_tokens]`` token ids.
        is_special: ``[vocab_size]`` bool.
        prompt_len: ``[num_slots]`` int32, tokens in each slot's original prompt.
        table: the edits at this hook point.
        rows: the features' rows.
        report_f: ``[>= num_tokens, MAX_INTERVENTIONS]`` float32; for tokens of slots that report,
            each edit's column gets its activation before the edit, NOT_COVERED, or SKIPPED_SINK.
            Nothing else is written: not the columns past the slot's edits, nor other tokens.
        reports: ``[num_slots]`` int32, nonzero for slots that report; goes with ``report_f``.
        counters: ``[2]`` int64; +1 for each token that some edit touched, and +1 for each that
            some edit would have touched but for a sink.
    """
    assert (report_f is None) == (reports is None), "report_f and reports go together"
    for t in range(hidden_states.shape[0]):
        slot = int(token_slot[t])
        if slot == NO_SLOT or not int(table.count[slot]):
            continue
        x = hidden_states[t].float()
        if residual is not None:
            x = x + residual[t].float()
        position = int(positions[t])
        special = position == 0 or bool(is_special[int(input_ids[t])])
        phase = COVERS_PROMPT if position < int(prompt_len[slot]) else COVERS_GENERATION
        delta = torch.zeros_like(x)
        touched = skipped = False
        for i in range(int(table.count[slot])):
            ints = table.ints[slot, i]
            coverage = int(ints[E_COVERAGE])
            covered = (
                bool(coverage & phase)
                and (not special or bool(coverage & COVERS_SPECIAL))
                and int(ints[E_START]) <= position < int(ints[E_END])
            )
            params = rows.params[int(ints[E_ROW])]
            sink = bool(x.norm() > params[P_SINK]) and not coverage & COVERS_SINKS
            f, g = activation(x, rows.W_enc[int(ints[E_ROW])], params)
            if report_f is not None and reports is not None and int(reports[slot]):
                report_f[t, i] = NOT_COVERED if not covered else SKIPPED_SINK if sink else float(f)
            touched |= covered and not sink
            skipped |= covered and sink
            if covered and not sink:
                change = edited(f, int(ints[E_OP]), table.value[slot, i])
                delta += change * params[P_DECODER_SCALE] * g * rows.W_dec[int(ints[E_ROW])]
        if touched:
            hidden_states[t] = (hidden_states[t].float() + delta).to(hidden_states.dtype)
        if counters is not None:
            counters += torch.tensor([touched, skipped], device=counters.device)


def activation(x: Tensor, w_enc: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """One latent's activation ``f`` on ``x`` ``[d_in]``, and the SAE's output scale ``g``."""
    z = w_enc @ x
    g = x.new_ones(())
    if int(params[P_NORM]) == NORM_LAYER:
        g = x.std()
        z = (z - x.mean() * params[P_ENC_SUM]) / (g + LAYER_NORM_EPS)
    elif int(params[P_NORM]) == NORM_CONSTANT:
        g = x.norm() / x.numel() ** 0.5
        z = z / g
    act = params[P_GAIN] * z + params[P_BIAS]
    fires = bool(act > params[P_THRESHOLD]) and bool(z + params[P_GATE_BIAS] > 0)
    return (act if fires else x.new_zeros(())), g


def edited(f: Tensor, op: int, value: Tensor) -> Tensor:
    """``f' - f`` for one operation. ``add`` never reads ``f``."""
    if op == OP_CLAMP:
        return value - f
    if op == OP_SCALE:
        return value * f - f
    if op == OP_ADD:
        return value
    if op == OP_FLOOR:
        return torch.maximum(f, value) - f
    assert op == OP_CAP
    return torch.minimum(f, value) - f
