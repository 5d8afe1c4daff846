"""Compile the Triton kernel without a GPU and read what ptxas made of it.

``python -m tests.bench.aot [out.json]`` prints a table over architectures (``--archs``, all of
sm_80, sm_90 and sm_100 unless told), widths (``--widths``), dtypes and forms of the stream:
registers, spills, shared memory, occupancy, and bytes in flight. Needs only the Triton package,
which brings ptxas and cuobjdump along.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from steering.worker.ops.layout import FLOAT16_LIMIT, INPUT_LAYER, INPUT_PLAIN, INPUT_RMS
from steering.worker.ops.triton_gates import gate_kernel
from steering.worker.ops.triton_kernel import steer_kernel
from steering.worker.ops.triton_parts import layout_for
from steering.worker.ops.triton_reads import read_kernel, reads_layout_for
from tests.bench.roofline import ROW_ITEMSIZE

ARCHS: Final = (80, 90, 100)
WIDTHS: Final = (576, 2304, 4096, 5120, 8192)
ITEMSIZE: Final = {"bf16": 2, "fp16": 2, "fp32": 4}

#: The edit of what is read here; conditions; the two halves of one that is read elsewhere, of which
#: the second adds edits of both kinds.
KERNELS: Final = {
    "edit": steer_kernel,
    "gates": gate_kernel,
    "reads": read_kernel,
    "writes": steer_kernel,
}


@dataclass(frozen=True)
class Variant:
    """One form of a kernel.

    Attributes:
        name: of `KERNELS`.
        dtype: of the stream.
        residual: whether the layer hands the residual over apart.
        residual_dtype: if it is another one: that of the model, where a compiled graph hands
            float32 hidden states over (`registered.steer_wide`).
        norm: what the place that is read is behind.
    """

    name: str = "edit"
    dtype: str = "bf16"
    residual: bool = True
    residual_dtype: str = ""
    norm: int = INPUT_PLAIN

    @property
    def stream(self) -> str:
        """In words."""
        residual = f"{self.residual_dtype} residual" if self.residual_dtype else ""
        parts = (self.dtype, residual if self.residual else "no residual", _NORMS[self.norm])
        return ", ".join(part for part in parts if part)


_NORMS: Final = {INPUT_PLAIN: "", INPUT_RMS: "RMS norm", INPUT_LAYER: "layer norm"}
_FUSED: Final = (("bf16", True), ("bf16", False), ("fp16", True), ("fp32", True))

#: Every dtype with a residual, and bfloat16 without, too; of the two halves bfloat16 alone.
VARIANTS: Final = (
    *(Variant(name, *form) for name in ("edit", "gates") for form in _FUSED),
    *(Variant(name, residual=False) for name in ("reads", "writes")),
)
#: What else a served model may ask for.
OTHERS: Final = (
    Variant("edit", "fp32", residual_dtype="bf16"),
    *(Variant("gates", norm=norm) for norm in (INPUT_RMS, INPUT_LAYER)),
    *(Variant("reads", norm=norm) for norm in (INPUT_PLAIN, INPUT_RMS, INPUT_LAYER)),
    Variant("writes"),
    *(Variant(name, dtype, False) for name in ("reads", "writes") for dtype in ("fp16", "fp32")),
)
WIDTHS_OF_OTHERS: Final = (4096, 8192)

_POINTERS: Final = {
    "token_slot_ptr": "*i32",
    "positions_ptr": "*i64",
    "input_ids_ptr": "*i32",
    "is_special_ptr": "*i1",
    "prompt_len_ptr": "*i32",
    "max_share_ptr": "*fp32",
    "kind_ptr": "*i32",
    "first_held_ptr": "*i32",
    "events_ptr": "*i32",
    "threshold_ptr": "*fp32",
    "share_ptr": "*fp32",
    "count_ptr": "*i32",
    "ints_ptr": "*i32",
    "value_ptr": "*fp32",
    "w_enc_ptr": "*fp32",
    "w_dec_ptr": "*fp32",
    "params_ptr": "*fp32",
    "f_ptr": "*fp32",
    "reports_ptr": "*i32",
    "counters_ptr": "*i64",
    "carried_ptr": "*fp32",
    "input_eps": "fp32",
}

# One multiprocessor, by compute capability (CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability"): all three have 65,536 registers, 64 warps and 32 blocks.
_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32
_SHARED: Final = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
#: Shared memory that the system takes from each block.
_SHARED_RESERVED: Final = 1024


@dataclass(frozen=True)
class Kernel:
    """One compiled variant.

    Attributes:
        name: of `KERNELS`.
        arch: compute capability times ten.
        dtype: of the stream.
        stream: how it comes, in words.
        registers: a thread's.
        spill_bytes: a thread's stack and local memory: where spilled registers go.
        shared_bytes: a program's.
        programs_per_sm: how many one multiprocessor holds.
        occupancy: its warps over the most it can hold.
        in_flight_bytes: rows that one multiprocessor has asked for at once.
    """

    name: str
    arch: int
    d_in: int
    dtype: str
    stream: str
    block_d: int
    block_e: int
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    programs_per_sm: int
    occupancy: float
    in_flight_bytes: int


def compile_kernel(arch: int, d_in: int, variant: Variant) -> Kernel:
    """Compile one variant and read its resources."""
    name, dtype = variant.name, variant.dtype
    kernel = KERNELS[name]
    layout = (reads_layout_for if name == "reads" else layout_for)(d_in, ITEMSIZE[dtype])
    constants: dict[str, Any] = {
        "D_IN": d_in,
        "ROW_STRIDE": d_in,
        "BLOCK_D": layout.block_d,
        "BLOCK_E": layout.block_e,
    }
    if kernel is steer_kernel:
        constants["LIMIT"] = FLOAT16_LIMIT if dtype == "fp16" else None
    if name == "edit":
        constants["carried_ptr"] = None
    if name in ("gates", "reads"):
        constants["INPUT_NORM"] = variant.norm
    types = _POINTERS | {
        "hidden_ptr": f"*{dtype}",
        "hidden_stride": "i32",
        "residual_stride": "i32",
        "share_stride": "i32",
    }
    if variant.residual:
        types["residual_ptr"] = f"*{variant.residual_dtype or dtype}"
    else:
        constants["residual_ptr"] = None
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
    # What the launcher finds at run time: every address and stride is a multiple of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        # A column of the shares lies where it lies.
        if signature[arg] not in ("constexpr", "fp32") and not arg.startswith("share")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": layout.num_warps, "enable_fp_fusion": True},
    )
    used = _resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    matrices = 2 if name in ("edit", "writes") else 1  # what is read only has no decoder row
    programs = _programs_per_sm(arch, layout.num_warps, used["REG"], shared)
    return Kernel(
        name=name,
        arch=arch,
        d_in=d_in,
        dtype=dtype,
        stream=variant.stream,
        block_d=layout.block_d,
        block_e=layout.block_e,
        num_warps=layout.num_warps,
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=shared,
        programs_per_sm=programs,
        occupancy=programs * layout.num_warps / _WARPS,
        in_flight_bytes=programs * layout.block_e * matrices * d_in * ROW_ITEMSIZE,
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """``cuobjdump --dump-resource-usage``: a line ``REG:102 STACK:0 SHARED:1024 LOCAL:0 ...``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    [line] = [line for line in text.splitlines() if "REG:" in line]
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}


def _programs_per_sm(arch: int, num_warps: int, registers: int, shared: int) -> int:
    # Registers are handed out to a warp in units of 256.
    warp_registers = -(-32 * registers // 256) * 256
    return min(
        _REGISTERS // (warp_registers * num_warps),
        _SHARED[arch] // (shared + _SHARED_RESERVED),
        _WARPS // num_warps,
        _BLOCKS,
    )


def compile_all(archs: Sequence[int] = ARCHS, widths: Sequence[int] = WIDTHS) -> list[Kernel]:
    """`VARIANTS` at all of these widths, and `OTHERS` at some, for every architecture."""
    others = [d_in for d_in in widths if d_in in WIDTHS_OF_OTHERS]
    return [
        compile_kernel(arch, d_in, variant)
        for variants, compiled in ((VARIANTS, widths), (OTHERS, others))
        for name in KERNELS
        for arch in archs
        for d_in in compiled
        for variant in variants
        if variant.name == name
    ]


def versions() -> dict[str, str]:
    """Of the compilers used."""
    return {
        "triton": triton.__version__,
        "ptxas (sm_80, sm_90)": knobs.nvidia.ptxas.version,
        "ptxas (sm_100)": knobs.nvidia.ptxas_blackwell.version,
        "cuobjdump": knobs.nvidia.cuobjdump.version,
    }


def table(kernels: Iterable[Kernel]) -> list[str]:
    """The variants as Markdown."""
    lines = [
        "| kernel | sm | d_in | stream | rows at once | warps | registers | spilled, B | shared, B "
        "| programs an SM | occupancy | rows in flight an SM, KiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for k in kernels:
        lines.append(
            f"| {k.name} | {k.arch} | {k.d_in} | {k.stream} | {k.block_e} | {k.num_warps} "
            f"| {k.registers} | {k.spill_bytes} | {k.shared_bytes} | {k.programs_per_sm} "
            f"| {k.occupancy:.0%} | {k.in_flight_bytes / 1024:.0f} |"
        )
    return lines


def main() -> None:
    """Compile, print, and write the JSON file if one is named."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernel without a GPU")
    parser.add_argument("out", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--archs", nargs="+", type=int, default=ARCHS)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    args = parser.parse_args()
    kernels = compile_all(args.archs, args.widths)
    print("\n".join(f"{name} {version}" for name, version in versions().items()))
    print("\n".join(table(kernels)))
    if args.out is not None:
        args.out.write_text(
            json.dumps({"versions": versions(), "kernels": [asdict(k) for k in kernels]}, indent=1)
        )


if __name__ == "__main__":
    main()
