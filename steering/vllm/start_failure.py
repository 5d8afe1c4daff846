"""Passes the reason why a process of the engine did not start to the process that started it.

vLLM's processes log the exception and end; the process that waits for them only learns that they
ended.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

#: Environment variable that names the file to which the first such exception goes, in one line.
FAILURE_VARIABLE: Final = "STEERING_FAILURE_FILE"
#: What vLLM logs, with the exception, before such a process ends.
LAST_WORDS: Final = frozenset({"WorkerProc failed to start.", "EngineCore failed to start."})
MAX_CHARS: Final = 1000


class _LeaveWord(logging.Handler):
    def __init__(self, file: Path) -> None:
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or record.msg not in LAST_WORDS:
            return
        said = " ".join(str(error).split())[:MAX_CHARS]
        # The first exception is the cause; later ones only say that some process ended. The folder
        # is gone if nobody waits any more.
        with suppress(OSError), self._file.open("x", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {said}" if said else type(error).__name__)


def leave_word_of_failure() -> None:
    """Have this process leave its exception in the file that `FAILURE_VARIABLE` names, if any."""
    file = os.environ.get(FAILURE_VARIABLE)
    logger = logging.getLogger("vllm")
    if file and not any(isinstance(handler, _LeaveWord) for handler in logger.handlers):
        logger.addHandler(_LeaveWord(Path(file)))
