"""Lets vLLM's V2 model runner run on a CPU under Triton's interpreter.

Put this folder on PYTHONPATH, and set TRITON_INTERPRET=1 and VLLM_USE_V2_MODEL_RUNNER=1. PyPI's
Triton has no CPU back end, and vLLM turns Triton off where it finds none; the interpreter needs
none, so a stand-in is registered in every process before vLLM is imported.
"""

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import Backend, backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class _InterpreterDriver(DriverBase):
        @staticmethod
        def is_active() -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise RuntimeError("nothing is timed under the interpreter")

    backends["cpu"] = Backend(compiler=None, driver=_InterpreterDriver)
