"""Control vectors for tests, as repeng writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor


def write_gguf(path: Path, by_layer: Mapping[int, Tensor], dtype: Any = np.float32) -> Path:
    """A control vector as repeng's `export_gguf` writes it."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(by_layer))
    for layer, vector in by_layer.items():
        writer.add_tensor(f"direction.{layer}", vector.numpy().astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
