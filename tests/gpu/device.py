"""Where the tests of this folder run: on a GPU or, to rehearse them, on a CPU in its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Environment variable: with 1 these tests run on a CPU, their kernels in Triton's interpreter.
REHEARSAL_VARIABLE: Final = "VLLM_SAE_GPU_REHEARSAL"
REHEARSAL: Final = os.environ.get(REHEARSAL_VARIABLE) == "1"
DEVICE: Final = "cpu" if REHEARSAL else "cuda"

Size = TypeVar("Size")


def sizes(first: Size, *others: Size) -> Sequence[Size]:
    """What a test is run with; a rehearsal, which the interpreter makes slow, with the first."""
    return (first,) if REHEARSAL else (first, *others)


def captured(launch: Callable[[], None]) -> Callable[[], None]:
    """``launch`` as a CUDA graph to replay; it must have run before. A CPU launches it again."""
    if REHEARSAL:
        return launch
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    replay: Callable[[], None] = graph.replay
    return replay


class _Waiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """On a CPU, what would make the host wait for a device: whatever needs a tensor's values."""

    _NEED_VALUES: Final = frozenset({"_local_scalar_dense", "equal", "masked_select", "nonzero"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self._NEED_VALUES or masks:
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_may_wait() -> Iterator[None]:
    """Whatever makes the host wait for the device within raises RuntimeError."""
    if REHEARSAL:
        with _Waiting():  # type: ignore[no-untyped-call]
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
