"""Loaded by every Python process of a client: whatever leaves this machine is noted and refused."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from typing import Any

_LOOPBACK = ("localhost", "localhost.localdomain", "")


def _refuse_elsewhere(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        _, address = args
        if isinstance(address, tuple) and not _is_here(str(address[0])):
            _refuse(f"connect {address[0]}:{address[1]}")
    elif event == "socket.getaddrinfo":
        host = args[0]
        name = host.decode() if isinstance(host, bytes) else str(host or "")
        if not _is_here(name):
            _refuse(f"look up {name}")


def _is_here(host: str) -> bool:
    if host in _LOOPBACK or host == socket.gethostname():
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse(what: str) -> None:
    with open(os.environ["STEERING_CLIENT_CALLS"], "a", encoding="utf-8") as calls:
        calls.write(f"{what}\n")
    raise OSError(f"a client may not leave this machine: {what}")


sys.addaudithook(_refuse_elsewhere)
