"""Lets vLLM load Gemma 3 with its vision tower where torchvision is not installed.

Put this folder on PYTHONPATH. No torchvision that a package index has can be imported beside the
CPU build of torch. Transformers then gives whoever asks for an image processor the one that is made
with Pillow, but vLLM imports the other's own module by its name; it gets Pillow's from there, too.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType

_NAME = "transformers.models.gemma3.image_processing_gemma3"


class _PillowsProcessor(Loader):
    def exec_module(self, module: ModuleType) -> None:
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        vars(module)["Gemma3ImageProcessor"] = Gemma3ImageProcessorPil


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(fullname, _PillowsProcessor()) if fullname == _NAME else None


if find_spec("torchvision") is None:
    sys.meta_path.insert(0, _Finder())
