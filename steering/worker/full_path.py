"""A pass at one hook point in torch, without a kernel: SAEs are encoded whole where needed."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.sae import SAE
from steering.worker.batch_work import BatchPart, Exact, FitTokens, FullPart
from steering.worker.ops import batched
from steering.worker.ops.batched import Stream
from steering.worker.ops.buffers import Buffers
from steering.worker.ops.compiled import CompiledReads
from steering.worker.pass_reports import PassReports
from steering.worker.probed_tokens import Asked
from steering.worker.probes import Totals, strongest
from steering.worker.record import RequestRecord
from steering.worker.residency import Residency
from steering.worker.whole_outputs import WholeOutputs


@torch.inference_mode()
def apply(
    hidden_states: Tensor,
    residual: Tensor | None,
    part: BatchPart,
    residency: Residency,
    buffers: Buffers,
    reports: PassReports,
    outputs: WholeOutputs,
) -> None:
    """Read conditions and edits, edit, and read features on the tokens of one part.

    Everything is read from the stream as it came in; only what is kept of the stream is read after
    the edits. The parts of one slot are handled in the order of its tokens, so that a condition
    that looks at earlier tokens knows them.

    Args:
        hidden_states: ``[num_tokens, d_in]`` model dtype, edited in place.
        residual: the same shape, or None; only read.
        part: the tokens, and what is to be done with them.
        residency: the SAEs that are read here, and where their weights are.
        buffers: the buffers of this hook point.
        reports: takes what was found, on its way to the records.
        outputs: what SAEs that write elsewhere make of whole tokens.
    """
    stream = batched.gather_stream(hidden_states, residual, part.token, buffers)
    for fit in part.fits:
        _fit_where_written(stream, fit, outputs)
    # If SAEs take turns in one place, the one that is there now comes first.
    encoded = [
        (full, residency.whole(full.sae).encode(stream.x[full.index]))
        for full in sorted(part.full, key=lambda full: not residency.is_near(full.sae))
    ]
    if part.gates is not None:
        f = batched.read(stream, part.gates.latents, buffers.rows).f
        for full, f_all in encoded:
            _put_exact(f, full, full.gates, f_all)
        batched.note_events(stream, f, part.gates, buffers)
    asked = Asked()
    if part.reads is not None:
        asked.elsewhere = _read_for_elsewhere(stream, part, part.reads, encoded, buffers)
    if part.edits is not None:
        asked.here = _edit(hidden_states, stream, part, encoded, residency, buffers, outputs)
    for full, f_all in encoded:
        if full.leaves_output:
            sae = residency.whole(full.sae)
            _leave_output(stream, full, f_all, sae, len(hidden_states), outputs)
        if full.reads is not None:
            _read(stream, full, f_all, residency, reports, outputs)
        for pooled in full.pools:
            pooled.observe(stream, f_all, residency.saes[full.sae])
    for kept in part.kept:
        kept.keep(hidden_states, residual, asked, buffers, reports)


def _read_for_elsewhere(
    stream: Stream,
    part: BatchPart,
    reads: CompiledReads,
    encoded: list[tuple[FullPart, Tensor]],
    buffers: Buffers,
) -> Tensor | None:
    """Leave the changes that edits ask for to the hook points where they are added.

    Whether an edit's conditions hold is known only there.

    Returns:
        As `_edit`, of these edits, whether or not their conditions will hold.
    """
    coverage = batched.cover(stream, reads.edits.covers)
    read = batched.read(stream, reads.edits.latents, buffers.rows)
    for full, f_all in encoded:
        _put_exact(read.f, full, full.elsewhere, f_all)
    batched.carry(read, coverage, reads, buffers)
    if not part.kept:
        return None
    return torch.where(coverage.covered, batched.asked(read.f, reads.edits), 0.0)


def _leave_output(
    stream: Stream,
    full: FullPart,
    f_all: Tensor,
    sae: SAE,
    num_tokens: int,
    outputs: WholeOutputs,
) -> None:
    output = outputs.leave(full.sae, num_tokens, sae.card.d_out, f_all.device)
    token = _tokens(stream.token, f_all.device)[full.index]
    output.decoded[token] = sae.decode(f_all, stream.x[full.index])
    output.l0[token] = (f_all != 0).sum(dim=1)


def _fit_where_written(stream: Stream, fit: FitTokens, outputs: WholeOutputs) -> None:
    """Compare a dictionary's reconstruction with the stream where it writes."""
    output = outputs.take(fit.sae)
    token = _tokens(stream.token, stream.x.device)[fit.index]
    assert fit.record.fit is not None
    fit.record.fit.observe(
        stream.position[fit.index],
        output.covered[token],
        stream.x[fit.index],
        output.decoded[token],
        output.l0[token],
    )


def _tokens(token: slice | Tensor, device: torch.device) -> Tensor:
    """``[n]`` int64 indices in the batch."""
    if isinstance(token, slice):
        return torch.arange(token.start, token.stop, device=device)
    return token


def _edit(
    hidden_states: Tensor,
    stream: Stream,
    part: BatchPart,
    encoded: list[tuple[FullPart, Tensor]],
    residency: Residency,
    buffers: Buffers,
    outputs: WholeOutputs,
) -> Tensor | None:
    """Edit the part's tokens.

    Returns:
        ``[n, e]`` float32, the change ``f' - f`` that each edit asks for, zero where it is not
        active; None if no stream of the part is kept.
    """
    edits = part.edits
    assert edits is not None
    coverage = batched.cover(stream, edits.covers)
    carried = batched.carried_change(edits, buffers)
    if carried is not None and edits.carried is not None:
        coverage = batched.without_sinks_elsewhere(coverage, carried, edits.carried)
    active, skipped, held = coverage.covered, coverage.skipped, None
    if edits.conditions is not None:
        is_open = batched.open_edits(stream, edits.conditions, buffers.gate_state)
        active, held = active & is_open, active & ~is_open
        skipped = None if skipped is None else skipped & is_open
    read = batched.read(stream, edits.latents, buffers.rows)
    for full, f_all in encoded:
        _put_exact(read.f, full, full.edits, f_all)
    batched.report(read.f, coverage, held, edits, buffers.f)
    difference = batched.difference(read, edits, active)
    scaled = difference if read.g is None else difference * read.g
    if carried is not None and edits.carried is not None:
        carried = torch.where(active, carried, 0.0)
        scaled = torch.where(edits.carried.elsewhere, carried, scaled)
    delta = batched.decoded(scaled, edits, buffers.rows)
    for full, f_all in encoded:
        if full.decodes is not None:
            _reconstruct(delta, stream, difference, full, f_all, residency.whole(full.sae))
    for sae, index in part.replaced:
        token = _tokens(stream.token, delta.device)[index]
        delta[index] += outputs.take(sae).decoded[token] - stream.x[index]
    is_edited = active.any(dim=1)
    delta = batched.bounded(delta, hidden_states, stream, buffers.limit)
    delta = batched.limited(delta, stream, is_edited, edits, buffers.share)
    batched.add_delta(hidden_states, stream, delta, is_edited)
    buffers.counters[0] += is_edited.sum()
    if skipped is not None:
        buffers.counters[1] += skipped.any(dim=1).sum()
    if not part.kept:
        return None
    return torch.where(active, batched.asked(read.f, edits), 0.0)


def _put_exact(f: Tensor, full: FullPart, exact: Exact | None, f_all: Tensor) -> None:
    """Replace activations read from rows alone by those of the whole encode ``[m, d_sae]``."""
    if exact is not None:
        f[full.index] = torch.where(exact.is_encoded, f_all.gather(1, exact.latent), f[full.index])


def _reconstruct(
    delta: Tensor,
    stream: Stream,
    difference: Tensor,
    full: FullPart,
    f_all: Tensor,
    sae: SAE,
) -> None:
    """With ``error_term: false`` the stream of an edited token becomes ``decode(f')``."""
    assert full.decodes is not None
    f_new = f_all
    if full.edits is not None:
        change = torch.where(full.edits.is_encoded, difference[full.index], 0.0)
        f_new = f_all.scatter_add(1, full.edits.latent, change)
    x = stream.x[full.index]
    replaced = sae.decode(f_new, x) - x
    delta[full.index] = torch.where(full.decodes[:, None], replaced, delta[full.index])


def _read(
    stream: Stream,
    full: FullPart,
    f_all: Tensor,
    residency: Residency,
    reports: PassReports,
    outputs: WholeOutputs,
) -> None:
    reads = full.reads
    assert reads is not None
    seen = Stream(
        reads.in_part,
        stream.x[reads.in_part],
        stream.position[reads.in_part],
        stream.special[reads.in_part],
    )
    covered = batched.cover(seen, reads.covers).covered[:, 0]
    f = f_all[reads.in_encode]
    if reads.covers_output:
        outputs.take(full.sae).covered[_tokens(stream.token, f.device)[reads.in_part]] = covered
    if reads.top_k:
        latents, values = strongest(f, reads.top_k)
        reports.copy(
            RequestRecord.put_reads, reads.record_np, seen.position, covered, latents, values
        )
    for record, read, tokens in reads.others:
        position, is_covered, f_read = seen.position[tokens], covered[tokens], f[tokens]
        if record.fit is not None and residency.saes[full.sae].card.one_place:
            x = seen.x[tokens]
            l0 = (f_read != 0).sum(dim=1)
            decoded = residency.whole(full.sae).decode(f_read, x)
            record.fit.observe(position, is_covered, x, decoded, l0)
        elif read.aggregate is not None:
            if record.totals is None:
                record.totals = Totals(read.aggregate, read.top_k, f.shape[1], f.device)
            record.totals.observe(position, is_covered, f_read)
