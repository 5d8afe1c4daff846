"""The small transcoder and the SAE of attention's heads that tests and examples use."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DATA: Final = Path(__file__).parent / "data"
#: By what they are served as.
SMALL_DICTIONARIES: Final = {
    "transcoder": DATA / "smollm2-135m-l14-transcoder",
    "heads": DATA / "smollm2-135m-l14-heads",
}
