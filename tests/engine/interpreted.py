"""The environment in which vLLM's V2 runner and Triton's kernels run on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: Environment in which vLLM runs its V2 model runner on a CPU.
INTERPRETER: Final = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "PYTHONPATH": str(Path(__file__).parent / "interpreter"),
}
