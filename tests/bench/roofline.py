"""What the kernel should cost on a GPU, from bytes and latencies.

``python -m tests.bench.roofline`` prints the tables of ``steering/worker/ops/README.md``, which
states the assumptions in words.
``tests/bench/kernel_gpu.py`` holds the same numbers against a real GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Final

from steering.worker.ops.triton_parts import Launch, layout_for
from steering.worker.ops.triton_reads import reads_layout_for

#: Part of a memory's peak rate that a good kernel gets.
ACHIEVED: Final = 0.8
#: Part of the peak arithmetic rate that large matrix products get.
ACHIEVED_FLOPS: Final = 0.6
#: One kernel in a replayed CUDA graph: seconds between its neighbours that it adds by existing.
LAUNCH_SECONDS: Final = 1.5e-6
#: Loads that wait for each other before the first row: slot, table, row index, stream, norm.
PROLOGUE_SECONDS: Final = 3.5e-6
#: One block of edits: its table entries, its rows from DRAM, one reduction over the program.
BLOCK_SECONDS: Final = 1.5e-6
#: A program without a slot, from its start to its successor's.
EXIT_SECONDS: Final = 1.0e-6
ROW_ITEMSIZE: Final = 4
#: An H100's NVLink, bytes a second in one direction, and what a small all-gather takes in any case.
NVLINK: Final = 450e9
GATHER_SECONDS: Final = 10e-6
#: Launches of a whole encode and what is done with it, as torch makes them outside of a graph, and
#: the processor's seconds for each.
WHOLE_LAUNCHES: Final = 60
EAGER_LAUNCH_SECONDS: Final = 5e-6
#: How often activations ``[tokens, d_sae]`` go through memory: written, thresholded, ranked.
ACTIVATION_PASSES: Final = 8


@dataclass(frozen=True)
class Device:
    """Rates of a GPU, from its data sheet; ``l2`` as microbenchmarks report it.

    Attributes:
        dram: bytes a second.
        l2: bytes a second, reading.
        l2_capacity: bytes.
        flops: dense bfloat16 operations a second.
        flops32: float32 operations a second, without TF32.
        sms: multiprocessors.
        cuda_name: what CUDA calls it. Others of a like name have memory of another rate.
    """

    name: str
    dram: float
    l2: float
    l2_capacity: float
    flops: float
    flops32: float
    sms: int
    cuda_name: str


A100: Final = Device(
    "A100 SXM 80 GB", 2.04e12, 4.0e12, 40e6, 312e12, 19.5e12, 108, "NVIDIA A100-SXM4-80GB"
)
H100: Final = Device("H100 SXM", 3.35e12, 5.5e12, 50e6, 990e12, 67e12, 132, "NVIDIA H100 80GB HBM3")
H200: Final = Device("H200", 4.8e12, 5.5e12, 50e6, 990e12, 67e12, 132, "NVIDIA H200")
B200: Final = Device("B200", 8.0e12, 10e12, 126e6, 2250e12, 75e12, 148, "NVIDIA B200")
DEVICES: Final = (A100, H100, H200, B200)


def device_named(name: str) -> Device | None:
    """The device that CUDA calls so; None if its rates are not known."""
    return next((device for device in DEVICES if device.cuda_name == name), None)


@dataclass(frozen=True)
class Model:
    """A served model, one tensor-parallel rank of it.

    Attributes:
        params: parameters in all, held in 16 bits.
        kv_bytes: bytes of key-value cache a token, all layers, all ranks.
        ranks: tensor-parallel size; the edit is repeated on each.
    """

    name: str
    d_in: int
    params: float
    kv_bytes: float
    ranks: int


LLAMA_8B: Final = Model("8B, one GPU", 4096, 8.03e9, 32 * 2 * 8 * 128 * 2, 1)
LLAMA_70B: Final = Model("70B, TP 4", 8192, 70.6e9, 80 * 2 * 8 * 128 * 2, 4)


@dataclass(frozen=True)
class Moved:
    """Bytes of one steered token.

    Attributes:
        stream: hidden state in and out, residual in.
        rows: encoder and decoder rows.
        metadata: what the kernel reads to find them, and writes to say what it did.
    """

    stream: int
    rows: int
    metadata: int

    @property
    def minimum(self) -> int:
        """Without metadata: no implementation can do with less."""
        return self.stream + self.rows

    @property
    def ratio(self) -> float:
        """Bytes moved over the minimum."""
        return (self.minimum + self.metadata) / self.minimum


def moved(
    d_in: int, itemsize: int, edits: int, *, residual: bool = True, add: bool = False
) -> Moved:
    """Bytes that the kernel asks for, for one token of a slot that reports.

    Args:
        d_in: width of the stream.
        itemsize: bytes of one of its elements.
        edits: edits that cover the token.
        residual: whether the layer returns its output and the residual apart.
        add: the edits are all ``add`` in a slot that does not report: no encoder row is read.
    """
    stream = (3 if residual else 2) * d_in * itemsize
    rows = (1 if add else 2) * edits * d_in * ROW_ITEMSIZE
    block_e = layout_for(d_in, itemsize).block_e
    # The token's facts, its share and a counter; by edit, its table entry, sink and normalization,
    # what it reports and where; and in whole blocks seven parameters.
    metadata = 33 + 8 + 44 * edits + 28 * block_e * ceil(edits / block_e)
    metadata += 0 if add else 8 + 12 * edits
    return Moved(stream, rows, metadata)


def moved_by_gates(d_in: int, itemsize: int, gates: int, *, residual: bool = True) -> Moved:
    """Bytes that the conditions' kernel asks for, for one ordinary token of a slot with ``gates``.

    Args:
        d_in: width of the stream.
        itemsize: bytes of one of its elements.
        gates: conditions of scope token that are read here.
        residual: whether the layer returns its output and the residual apart.
    """
    stream = (2 if residual else 1) * d_in * itemsize
    block_e = layout_for(d_in, itemsize).block_e
    # The token's facts and its bits; by condition, its table entry, normalization and activation;
    # and in whole blocks seven parameters.
    metadata = 25 + 8 + 28 * gates + 28 * block_e * ceil(gates / block_e)
    return Moved(stream, gates * d_in * ROW_ITEMSIZE, metadata)


def moved_by_reads(d_in: int, itemsize: int, edits: int, *, residual: bool = False) -> Moved:
    """Bytes that the reading half asks for, for one token of a slot that reports.

    Args:
        d_in: width of the stream.
        itemsize: bytes of one of its elements.
        edits: edits that are read here and added elsewhere.
        residual: whether the layer returns its output and the residual apart.
    """
    stream = (2 if residual else 1) * d_in * itemsize
    block_e = reads_layout_for(d_in, itemsize).block_e
    # The token's facts; by edit, its table entry, sink, normalization and activation, and the
    # change that is left; in whole blocks seven parameters.
    metadata = 29 + 52 * edits + 28 * block_e * ceil(edits / block_e)
    return Moved(stream, edits * d_in * ROW_ITEMSIZE, metadata)


def moved_by_writes(d_in: int, itemsize: int, edits: int, *, residual: bool = False) -> Moved:
    """Bytes that the writing half asks for; arguments as those of `moved_by_reads`."""
    stream = (3 if residual else 2) * d_in * itemsize
    block_e = layout_for(d_in, itemsize).block_e
    metadata = 49 + 68 * edits + 28 * block_e * ceil(edits / block_e)
    return Moved(stream, edits * d_in * ROW_ITEMSIZE, metadata)


def op_seconds(
    device: Device, d_in: int, itemsize: int, tokens: int, edits: int, configurations: int
) -> float:
    """Time of one launch over ``tokens`` steered tokens in ``configurations`` distinct edit lists.

    The longest of three: DRAM traffic, L2 traffic, and the waves of programs that each wait for
    their rows.
    """
    one = moved(d_in, itemsize, edits)
    layout = layout_for(d_in, itemsize)
    return _launch_seconds(device, layout, tokens, one, edits, configurations)


def gate_seconds(
    device: Device, d_in: int, itemsize: int, tokens: int, gates: int, configurations: int
) -> float:
    """Time of the conditions' launch, as `op_seconds`."""
    one = moved_by_gates(d_in, itemsize, gates)
    layout = layout_for(d_in, itemsize)
    return _launch_seconds(device, layout, tokens, one, gates, configurations)


def read_seconds(
    device: Device, d_in: int, itemsize: int, tokens: int, edits: int, configurations: int
) -> float:
    """Time of the reading half of a dictionary that writes elsewhere, as `op_seconds`."""
    one = moved_by_reads(d_in, itemsize, edits)
    layout = reads_layout_for(d_in, itemsize)
    return _launch_seconds(device, layout, tokens, one, edits, configurations)


def write_seconds(
    device: Device, d_in: int, itemsize: int, tokens: int, edits: int, configurations: int
) -> float:
    """Time of its writing half at one place, as `op_seconds`."""
    one = moved_by_writes(d_in, itemsize, edits)
    layout = layout_for(d_in, itemsize)
    return _launch_seconds(device, layout, tokens, one, edits, configurations)


def _launch_seconds(
    device: Device, layout: Launch, tokens: int, one: Moved, entries: int, configurations: int
) -> float:
    distinct_rows = min(tokens, configurations) * one.rows
    # Rows that L2 cannot keep come from DRAM each time.
    from_dram = distinct_rows if distinct_rows <= device.l2_capacity else tokens * one.rows
    dram = (tokens * one.stream + from_dram) / (ACHIEVED * device.dram)
    l2 = tokens * (one.stream + one.rows) / (ACHIEVED * device.l2)
    waves = ceil(tokens / (device.sms * programs_per_sm(layout)))
    waiting = waves * (PROLOGUE_SECONDS + ceil(entries / layout.block_e) * BLOCK_SECONDS)
    return LAUNCH_SECONDS + max(dram, l2, waiting)


def idle_seconds(device: Device, d_in: int, itemsize: int, tokens: int) -> float:
    """Time of one launch in which no token has a slot: waves of programs that load one number."""
    waves = ceil(tokens / (device.sms * programs_per_sm(layout_for(d_in, itemsize))))
    return LAUNCH_SECONDS + waves * EXIT_SECONDS


def whole_seconds(device: Device, d_in: int, d_sae: int, itemsize: int, tokens: int) -> float:
    """Time of a pass's whole encode of an SAE on the device, ranked for `read`.

    Args:
        device: the GPU.
        d_in: width of the stream.
        d_sae: latents.
        itemsize: bytes of one of the SAE's weights as they are stored.
        tokens: that are encoded.
    """
    weights = d_in * d_sae
    # Weights of 16 bits are read, written in float32, and read again by the product.
    traffic = weights * (itemsize if itemsize == ROW_ITEMSIZE else itemsize + 2 * ROW_ITEMSIZE)
    encode = max(
        traffic / (ACHIEVED * device.dram),
        2 * weights * tokens / (ACHIEVED_FLOPS * device.flops32),
    )
    activations = ACTIVATION_PASSES * 4 * tokens * d_sae / (ACHIEVED * device.dram)
    return max(encode + activations, WHOLE_LAUNCHES * EAGER_LAUNCH_SECONDS)


def split_seconds(device: Device, d_in: int, tokens: int, edits: int) -> tuple[float, float]:
    """An edit in two launches that was not built: with edits, and with nobody steered.

    Programs of one block of edits of one token leave their changes; programs of a sixteenth of
    ``d_in`` of one token then add rows in fixed order. All lists are the same.
    """
    layout = layout_for(d_in, 2)
    blocks = ceil(64 / layout.block_e)
    slices = 16

    def waves(programs: int, warps: int) -> int:
        return ceil(programs / (device.sms * programs_per_sm(layout._replace(num_warps=warps))))

    one = moved(d_in, 2, edits)
    traffic = tokens * (blocks * one.stream / 3 + one.stream + one.rows) / (ACHIEVED * device.l2)
    reading = waves(tokens * blocks, layout.num_warps) * (PROLOGUE_SECONDS + BLOCK_SECONDS)
    adding = waves(tokens * slices, 4) * (PROLOGUE_SECONDS + BLOCK_SECONDS)
    idle = EXIT_SECONDS * (waves(tokens * blocks, layout.num_warps) + waves(tokens * slices, 4))
    return 2 * LAUNCH_SECONDS + max(reading + adding, traffic), 2 * LAUNCH_SECONDS + idle


def programs_per_sm(layout: Launch) -> int:
    """Programs that one multiprocessor holds at 128 registers a thread (``aot.py`` has fewer)."""
    return max(1, 65536 // (128 * 32 * layout.num_warps))


def decode_seconds(device: Device, model: Model, batch: int, context: int) -> float:
    """Time of one decode step: weights and key-value cache once through DRAM, nothing else."""
    weights = 2 * model.params / model.ranks
    cache = batch * context * model.kv_bytes / model.ranks
    flops = 2 * model.params * batch / model.ranks
    return max(
        (weights + cache) / (ACHIEVED * device.dram), flops / (ACHIEVED_FLOPS * device.flops)
    )


def prefill_seconds(device: Device, model: Model, tokens: int) -> float:
    """Time of one prefill step: the matrix products, nothing else."""
    return 2 * model.params * tokens / model.ranks / (ACHIEVED_FLOPS * device.flops)


def decode_table(device: Device, context: int) -> list[str]:
    """Share of a decode step, as Markdown."""
    lines = [
        "| model | batch | edits | step, ms | one configuration: op, us | share "
        "| all distinct: op, us | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in (LLAMA_8B, LLAMA_70B):
        for batch in (1, 32, 256):
            step = decode_seconds(device, model, batch, context)
            for edits in (1, 8, 64):
                ops = [op_seconds(device, model.d_in, 2, batch, edits, k) for k in (1, batch)]
                cells = [f"{1e6 * op:.1f} | {100 * op / step:.2f}%" for op in ops]
                lines.append(
                    f"| {model.name} | {batch} | {edits} | {1e3 * step:.1f} | {' | '.join(cells)} |"
                )
    return lines


def gates_table(device: Device, context: int) -> list[str]:
    """What eight conditions add to a decode step with eight edits, as Markdown."""
    lines = [
        "| model | batch | edits alone, us | conditions, us | share of the step, both |",
        "|---|---|---|---|---|",
    ]
    for model in (LLAMA_8B, LLAMA_70B):
        for batch in (1, 32, 256):
            step = decode_seconds(device, model, batch, context)
            edits = op_seconds(device, model.d_in, 2, batch, 8, batch)
            gates = gate_seconds(device, model.d_in, 2, batch, 8, batch)
            lines.append(
                f"| {model.name} | {batch} | {1e6 * edits:.1f} | {1e6 * gates:.1f} "
                f"| {100 * (edits + gates) / step:.2f}% |"
            )
    return lines


def halves_table(device: Device, context: int) -> list[str]:
    """A transcoder's eight edits in a decode step: read at one place, added at one, as Markdown."""
    lines = [
        "| model | batch | reading, us | writing, us | share of the step, both "
        "| written at 8 places |",
        "|---|---|---|---|---|---|",
    ]
    for model in (LLAMA_8B, LLAMA_70B):
        for batch in (1, 32, 256):
            step = decode_seconds(device, model, batch, context)
            reads = read_seconds(device, model.d_in, 2, batch, 8, batch)
            writes = write_seconds(device, model.d_in, 2, batch, 8, batch)
            lines.append(
                f"| {model.name} | {batch} | {1e6 * reads:.1f} | {1e6 * writes:.1f} "
                f"| {100 * (reads + writes) / step:.2f}% "
                f"| {100 * (reads + 8 * writes) / step:.2f}% |"
            )
    return lines


def gather_seconds(d: int, itemsize: int, tokens: int, ranks: int) -> float:
    """Time in which each rank gets the others' heads: ``[tokens, d]`` in all, on H100s."""
    received = tokens * d * itemsize * (ranks - 1) / ranks
    return GATHER_SECONDS + received / (ACHIEVED * NVLINK)


def heads_table(context: int) -> list[str]:
    """Eight edits at ``attn.hook_z`` in a decode step of ranks that share the heads, as Markdown.

    On H100s; one rank alone pays for the edit only.
    """
    lines = [
        "| model | batch | edits, us | all-gather, us | share of the step, both |",
        "|---|---|---|---|---|",
    ]
    model = LLAMA_70B
    for batch in (1, 32, 256):
        step = decode_seconds(H100, model, batch, context)
        edits = op_seconds(H100, model.d_in, 2, batch, 8, batch)
        gather = gather_seconds(model.d_in, 2, batch, model.ranks)
        lines.append(
            f"| {model.name} | {batch} | {1e6 * edits:.1f} | {1e6 * gather:.1f} "
            f"| {100 * (edits + gather) / step:.2f}% |"
        )
    return lines


def whole_table(device: Device, context: int) -> list[str]:
    """A decode step in which the whole batch is encoded in full once, as Markdown."""
    lines = [
        "| model | batch | step, ms | 32k latents, bfloat16: ms | share | float32: ms | share "
        "| 131k, bfloat16: ms | share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in (LLAMA_8B, LLAMA_70B):
        for batch in (1, 32, 256):
            step = decode_seconds(device, model, batch, context)
            cells = []
            for d_sae, itemsize in ((32768, 2), (32768, 4), (131072, 2)):
                whole = whole_seconds(device, model.d_in, d_sae, itemsize, batch)
                cells.append(f"{1e3 * whole:.2f} | {100 * whole / step:.0f}%")
            lines.append(f"| {model.name} | {batch} | {1e3 * step:.1f} | {' | '.join(cells)} |")
    return lines


def split_table(device: Device) -> list[str]:
    """64 edits in one launch and in two, and what an idle pass then costs, as Markdown."""
    lines = [
        "| d_in | tokens | one launch, us | two launches, us | idle, one, us | idle, two, us |",
        "|---|---|---|---|---|---|",
    ]
    for d_in in (4096, 8192):
        for tokens in (1, 8, 32, 256, 2048):
            one = op_seconds(device, d_in, 2, tokens, 64, 1), idle_seconds(device, d_in, 2, tokens)
            two = split_seconds(device, d_in, tokens, 64)
            cells = (one[0], two[0], one[1], two[1])
            shown = " | ".join(f"{1e6 * cell:.1f}" for cell in cells)
            lines.append(f"| {d_in} | {tokens} | {shown} |")
    return lines


def prefill_table(device: Device, tokens: int) -> list[str]:
    """Share of a prefill step in which one request's edits cover every token, as Markdown."""
    lines = [
        "| model | tokens | edits | step, ms | op, us | share |",
        "|---|---|---|---|---|---|",
    ]
    for model in (LLAMA_8B, LLAMA_70B):
        step = prefill_seconds(device, model, tokens)
        for edits in (1, 8, 64):
            op = op_seconds(device, model.d_in, 2, tokens, edits, 1)
            lines.append(
                f"| {model.name} | {tokens} | {edits} | {1e3 * step:.1f} | {1e6 * op:.0f} "
                f"| {100 * op / step:.2f}% |"
            )
    return lines


def bytes_table() -> list[str]:
    """Bytes of one steered token against the minimum, as Markdown."""
    lines = [
        "| d_in | edits | stream, B | rows, B | metadata, B | moved / minimum |",
        "|---|---|---|---|---|---|",
    ]
    for d_in in (576, 2304, 4096, 5120, 8192):
        for edits in (1, 8, 64):
            one = moved(d_in, 2, edits)
            lines.append(
                f"| {d_in} | {edits} | {one.stream:,} | {one.rows:,} | {one.metadata:,} "
                f"| {one.ratio:.3f} |"
            )
    return lines


def main() -> None:
    """Print every table."""
    print("\n".join(bytes_table()))
    for device in (A100, H100, B200):
        for context in (1024, 0):
            print(f"\n{device.name}, decode, context {context}\n")
            print("\n".join(decode_table(device, context)))
        print(f"\n{device.name}, decode, context 1024, eight conditions, all lists distinct\n")
        print("\n".join(gates_table(device, 1024)))
        print(f"\n{device.name}, decode, context 1024, eight edits of a transcoder, all distinct\n")
        print("\n".join(halves_table(device, 1024)))
        if device is H100:
            print(f"\n{device.name}, decode, context 1024, eight edits of the heads\n")
            print("\n".join(heads_table(1024)))
        print(f"\n{device.name}, decode, context 1024, every token encoded in full\n")
        print("\n".join(whole_table(device, 1024)))
        print(f"\n{device.name}, 64 edits, one list\n")
        print("\n".join(split_table(device)))
        print(f"\n{device.name}, prefill\n")
        print("\n".join(prefill_table(device, 2048)))


if __name__ == "__main__":
    main()
