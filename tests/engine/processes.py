"""A server's processes as Linux knows them: who they are, and what memory and files they hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """One process. `name` is its command line, which vLLM's processes set to say what they are."""

    pid: int
    name: str

    @property
    def resident_bytes(self) -> int:
        """Memory of its own and shared; 0 once it has ended."""
        for line in self._read("status").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0

    @property
    def open_files(self) -> int:
        """Descriptors, sockets included; 0 once it has ended."""
        with contextlib.suppress(OSError):
            return len(list((_PROC / str(self.pid) / "fd").iterdir()))
        return 0

    def _read(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return (_PROC / str(self.pid) / name).read_text()
        return ""


def of_session(leader: int) -> list[Process]:
    """All that run in the session of a process that was started in a new one, oldest first."""
    return sorted(_in_session(leader), key=lambda process: process.pid)


def _in_session(leader: int) -> Iterator[Process]:
    for folder in _PROC.iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # After the name, which may hold spaces: state, parent, group, session.
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            if session == leader:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                yield Process(int(folder.name), b" ".join(words).decode(errors="replace").strip())
