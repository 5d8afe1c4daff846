"""The conditions and the edit over a whole batch in torch, of which the full path is made.

What does not depend on the stream is compiled once for each batch (`compiled`). Here are the steps
of a pass: which entries cover which tokens, what the activations are, which conditions hold, and
what the delta is. An entry is an edit or a condition of a slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from steering.worker.gates import GateState
from steering.worker.ops.buffers import Buffers, InputNorm
from steering.worker.ops.compiled import (
    Carried,
    CompiledEdits,
    CompiledGates,
    CompiledReads,
    Conditions,
    Covers,
    Latents,
    RunRows,
)
from steering.worker.ops.layout import (
    GATE_BELOW,
    HELD_BACK,
    INPUT_LAYER,
    INPUT_PLAIN,
    KIND_SCOPE,
    KIND_SENSE,
    LAYER_NORM_EPS,
    MAX_GATES,
    NEVER,
    NOT_COVERED,
    NOT_EDITED,
    QUIET,
    SCOPE_PROMPT,
    SCOPE_TOKEN,
    SILENT,
    SKIPPED_SINK,
)
from steering.worker.rows import Rows


@dataclass(frozen=True)
class Stream:
    """The stream of some tokens, and what each token is.

    Attributes:
        token: index in the batch: a slice, or ``[n]`` int64.
        x: ``[n, d_in]`` float32, hidden states plus residual, after the hook point's input norm.
        position: ``[n]`` int64.
        special: ``[n]`` bool, whether it is a special token or the sequence's first.
    """

    token: slice | Tensor
    x: Tensor
    position: Tensor
    special: Tensor

    @cached_property
    def norm(self) -> Tensor:
        """``[n]`` float32, Euclidean norm of ``x``."""
        norm: Tensor = torch.linalg.vector_norm(self.x, dim=1)
        return norm


@dataclass(frozen=True)
class Read:
    """What is read of each entry's latent on each token; all ``[n, e]`` float32.

    Attributes:
        p: the pre-activation.
        f: the activation.
        g: the SAE's output scale; None if it is 1 for all.
    """

    p: Tensor
    f: Tensor
    g: Tensor | None


@dataclass(frozen=True)
class Coverage:
    """Which entries cover which tokens; all ``[n, e]`` bool.

    Attributes:
        covered: whether the entry applies to the token.
        skipped: whether it would apply if the token were no sink; None if nothing can be a sink.
    """

    covered: Tensor
    skipped: Tensor | None


def gather_stream(
    hidden_states: Tensor, residual: Tensor | None, token: slice | Tensor, buffers: Buffers
) -> Stream:
    """The stream of the tokens with index ``token`` in the batch; see `Stream`."""
    x = hidden_states[token].float()
    if residual is not None:
        x = x + residual[token].float()
    x = _normalized(x, buffers.input_norm)
    position = buffers.positions[token]
    return Stream(
        token=token,
        x=x,
        position=position,
        special=buffers.is_special.index_select(0, buffers.input_ids[token]) | (position == 0),
    )


def _normalized(x: Tensor, norm: InputNorm) -> Tensor:
    if norm.kind == INPUT_PLAIN:
        return x
    if norm.kind == INPUT_LAYER:
        x = x - x.mean(dim=1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + norm.eps)


def cover(stream: Stream, covers: Covers) -> Coverage:
    """Find out which entries cover which tokens of the stream."""
    position = stream.position[:, None]
    # For booleans, a <= b means that a implies b.
    covered = (
        (position >= covers.low)
        & (position < covers.high)
        & (stream.special[:, None] <= covers.special)
    )
    if covers.sink_norm is None:
        return Coverage(covered=covered, skipped=None)
    sink = stream.norm[:, None] > covers.sink_norm
    return Coverage(covered=covered & ~sink, skipped=covered & sink)


def read(stream: Stream, latents: Latents, pool: Rows) -> Read:
    """Read each entry's latent on each token, from its row alone."""
    z = _encoded(stream.x, latents.rows, pool)
    g = None
    if latents.norms is not None:
        norms = latents.norms
        mean = stream.x.mean(dim=1)[:, None]
        std = stream.x.std(dim=1)[:, None]
        scale = stream.norm[:, None] / stream.x.shape[1] ** 0.5
        z = torch.where(norms.layer, (z - mean * norms.enc_sum) / (std + LAYER_NORM_EPS), z)
        z = torch.where(norms.constant, z / scale, z)
        g = torch.where(norms.layer, std, torch.where(norms.constant, scale, 1.0))
    p = torch.addcmul(latents.bias, latents.gain, z)
    fires = p > latents.threshold
    if latents.gate_bias is not None:
        fires &= z + latents.gate_bias > 0
    return Read(p, torch.where(fires, p, latents.zero), g)


def note_events(stream: Stream, f: Tensor, gates: CompiledGates, buffers: Buffers) -> None:
    """`reference.read_gates`, given the activations.

    Args:
        stream: the tokens.
        f: ``[n, e]`` float32, the activation of each condition's latent.
        gates: the conditions.
        buffers: the buffers of the hook point.
    """
    eligible = gates.exists & ~stream.special[:, None]
    if gates.sink_norm is not None:
        eligible &= ~(stream.norm[:, None] > gates.sink_norm)
    position = stream.position[:, None]
    quiet = eligible & (f <= gates.threshold)
    event = eligible & (f > gates.threshold) & (position >= gates.low) & (position < gates.high)
    state = buffers.gate_state
    bits = (event.int() << gates.index) | (quiet.int() << (gates.index + QUIET))
    # Each gate has bits of its own: their sum is their union.
    state.events[stream.token] |= bits.sum(dim=1, dtype=torch.int32)
    first = torch.where(event & gates.kept, position, NEVER).int()
    state.first_held.view(-1).scatter_reduce_(0, gates.state.view(-1), first.view(-1), "amin")
    into = buffers.f.view(-1)
    source, target = gates.f.source, gates.f.target
    into[target] = torch.where(eligible.view(-1)[source], f.view(-1)[source], into[target])


def open_edits(stream: Stream, conditions: Conditions, state: GateState) -> Tensor:
    """``[n, e]`` bool, whether the edit's conditions hold at the token."""
    gate = torch.arange(MAX_GATES, dtype=torch.int32, device=stream.position.device)
    events = state.events[stream.token][:, None]
    kind = state.kind[conditions.slot]  # [n, MAX_GATES]
    below, scope = kind & KIND_SENSE == GATE_BELOW, kind // KIND_SCOPE
    at_token = (events >> (gate + QUIET * below)) & 1 != 0
    last = torch.where(scope == SCOPE_PROMPT, conditions.prompt_len - 1, stream.position[:, None])
    so_far = (state.first_held[conditions.slot] <= last) != below
    is_open = torch.where(scope == SCOPE_TOKEN, at_token, so_far)
    bits = (is_open.int() << gate).sum(dim=1, dtype=torch.int32)[:, None]
    named = bits & conditions.named
    return torch.where(conditions.one_is_enough, named != 0, named == conditions.named)


def carry(read: Read, coverage: Coverage, reads: CompiledReads, buffers: Buffers) -> None:
    """`reference.read_edits`, given what was read and which tokens the edits cover."""
    edits = reads.edits
    if edits.reported is not None:
        source, target = edits.reported.source, edits.reported.target
        known, f = coverage.covered.view(-1)[source], read.f.view(-1)[source]
        buffers.f.view(-1)[target] = torch.where(known, f, buffers.f.view(-1)[target])
    change = difference(read, edits, coverage.covered)
    if read.g is not None:
        change = change * read.g
    if edits.decoder_scale is not None:
        change = change * edits.decoder_scale
    applies = coverage.covered
    if coverage.skipped is not None:
        change = torch.where(coverage.skipped, SKIPPED_SINK, change)
        applies = applies | coverage.skipped
    assert buffers.carried is not None
    into, source, target = buffers.carried.view(-1), reads.into.source, reads.into.target
    into[target] = torch.where(applies.view(-1)[source], change.view(-1)[source], into[target])


def carried_change(edits: CompiledEdits, buffers: Buffers) -> Tensor | None:
    """``[n, e]`` what the hook points that read the edits left; None if all are read here."""
    if edits.carried is None or buffers.carried is None:
        return None
    left: Tensor = buffers.carried.view(-1)[edits.carried.index]
    return left


def without_sinks_elsewhere(coverage: Coverage, left: Tensor, carried: Carried) -> Coverage:
    """The coverage without the tokens that were sinks where the edit was read.

    Args:
        coverage: what `cover` found.
        left: ``[n, e]`` what `carried_change` returned.
        carried: the edits that were read elsewhere.
    """
    sink = coverage.covered & carried.elsewhere & (left == SKIPPED_SINK)
    skipped = sink if coverage.skipped is None else coverage.skipped | sink
    return Coverage(covered=coverage.covered & ~sink, skipped=skipped)


def asked(f: Tensor, edits: CompiledEdits) -> Tensor:
    """The change ``f' - f`` ``[n, e]`` float32 that each edit asks for, as if it were active."""
    change = edits.change
    d = torch.addcmul(change.offset, change.factor, f)
    if change.least is not None and change.most is not None:
        d = torch.clamp(d, change.least, change.most)
    return d


def difference(read: Read, edits: CompiledEdits, active: Tensor) -> Tensor:
    """The change that each edit makes ``[n, e]`` float32, zero where it is not active.

    It is ``f' - f``, or ``p' - p`` if the row is solved (see `reference.reread`).

    Args:
        read: what was read of the edits' latents.
        edits: the edits.
        active: ``[n, e]`` bool.
    """
    f = read.f
    d = asked(f, edits)
    if edits.rereads is not None:
        again = edits.rereads
        new = torch.clamp(torch.addcmul(again.offset, again.factor, f), again.least, again.most)
        threshold = edits.latents.threshold
        silent = torch.minimum(read.p, SILENT * threshold)
        wanted = torch.where(new > threshold, new, silent) - read.p
        d = torch.where(again.solved, torch.where(new == f, edits.latents.zero, wanted), d)
    return torch.where(active, d, edits.latents.zero)


def decoded(coefficient: Tensor, edits: CompiledEdits, pool: Rows) -> Tensor:
    """``sum_e coefficient[:, e] * s_e * W_dec[row[:, e]]``: ``[n, d_in]`` float32."""
    if edits.decoder_scale is not None:
        coefficient = coefficient * edits.decoder_scale
    rows = edits.latents.rows
    if rows.W_dec is not None and len(rows.bounds) == len(coefficient):
        return torch.bmm(coefficient[:, None, :], rows.W_dec).squeeze(1)
    delta = coefficient.new_empty(coefficient.shape[0], pool.W_dec.shape[1])
    for start, stop, w in _runs(rows, rows.W_dec, pool.W_dec):
        torch.mm(coefficient[start:stop], w, out=delta[start:stop])
    return delta


def report(
    f: Tensor, coverage: Coverage, held: Tensor | None, edits: CompiledEdits, into: Tensor
) -> None:
    """Write the activations of slots that report, or why there are none; see `Buffers.f`.

    Args:
        f: ``[n, e]`` float32, the activations.
        coverage: what `cover` found.
        held: ``[n, e]`` bool, covered but held back by a condition; None without conditions.
        edits: the edits of the tokens.
        into: the buffer of activations.
    """
    if edits.reported is None:
        return
    found = torch.where(coverage.covered, f, NOT_COVERED)
    if held is not None:
        found = torch.where(held, HELD_BACK, found)
    if coverage.skipped is not None:
        found = torch.where(coverage.skipped, SKIPPED_SINK, found)
    source, target = edits.reported.source, edits.reported.target
    found = found.view(-1)[source]
    if edits.carried is not None:
        # What was read elsewhere stands there already.
        known = edits.carried.elsewhere & coverage.covered
        known = known if held is None else known & ~held
        found = torch.where(known.view(-1)[source], into.view(-1)[target], found)
    into.view(-1)[target] = found


def bounded(delta: Tensor, hidden_states: Tensor, stream: Stream, limit: float) -> Tensor:
    """``delta`` ``[n, d_in]``, cut where an element would grow past the limit.

    No element of the stream, nor of the hidden states to which delta is added, becomes larger in
    size than ``limit`` or, if that is more, than it was.
    """
    if limit == math.inf:
        return delta
    for before in (stream.x, hidden_states[stream.token].float()):
        after, bound = before + delta, before.abs().clamp(min=limit)
        delta = torch.where(after.abs() > bound, after.clamp(-bound, bound) - before, delta)
    return delta


def limited(
    delta: Tensor, stream: Stream, is_edited: Tensor, edits: CompiledEdits, share_out: Tensor
) -> Tensor:
    """Limit delta to the slots' ``max_share``, and write what share it is; see `Buffers.share`.

    Args:
        delta: ``[n, d_in]`` float32, what the edits add.
        stream: the tokens.
        is_edited: ``[n]`` bool, which of them are edited.
        edits: the edits of the tokens.
        share_out: the buffer of shares.

    Returns:
        ``[n, d_in]`` float32, what may be added.
    """
    if edits.max_share is None and edits.shares is None:
        return delta
    norm = torch.linalg.vector_norm(delta, dim=1)
    share = torch.where(stream.norm > 0, norm / stream.norm, 0.0)
    if edits.max_share is not None:
        over = share > edits.max_share
        delta = delta * torch.where(over, edits.max_share / share, 1.0)[:, None]
        share = torch.where(over, -edits.max_share, share)
    if edits.shares is not None:
        found = torch.where(is_edited, share, NOT_EDITED)
        share_out[edits.shares.target] = found[edits.shares.source]
    return delta


def add_delta(hidden_states: Tensor, stream: Stream, delta: Tensor, is_edited: Tensor) -> None:
    """Add delta to the hidden states of the stream's tokens, in float32, with one final cast.

    Args:
        hidden_states: ``[num_tokens, d_in]`` model dtype, changed in place.
        stream: the tokens.
        delta: ``[n, d_in]`` float32, what to add.
        is_edited: ``[n]`` bool, the tokens to which it is added; the others keep every bit.
    """
    before = hidden_states[stream.token]
    after = (before.float() + delta).to(hidden_states.dtype)
    hidden_states[stream.token] = torch.where(is_edited[:, None], after, before)


def _encoded(x: Tensor, rows: RunRows, pool: Rows) -> Tensor:
    """``W_enc[row[t, i]] @ x[t]``: ``[n, e]`` float32."""
    if rows.W_enc is not None and len(rows.bounds) == len(x):
        # With the rows as the right factor: on a CPU, torch takes eight times as long the other
        # way.
        return torch.bmm(x[:, None, :], rows.W_enc.transpose(1, 2)).squeeze(1)
    z = x.new_empty(x.shape[0], rows.row.shape[1])
    for start, stop, w in _runs(rows, rows.W_enc, pool.W_enc):
        torch.mm(x[start:stop], w.T, out=z[start:stop])
    return z


def _runs(rows: RunRows, gathered: Tensor | None, w: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """``(start, stop, rows [e, d_in])`` of every run of tokens."""
    for i, (start, stop) in enumerate(rows.bounds):
        yield start, stop, w[rows.row[i]] if gathered is None else gathered[i]
