"""The prefix-cache salt: who may share KV blocks with whom."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from steering.request.spec import SteeringSpec


def cache_salt(
    spec: SteeringSpec,
    checksums: Mapping[str, str],
    prompt_len: int,
    user_salt: str | None,
) -> str | None:
    """The salt under which a request's KV blocks are stored.

    Requests share blocks exactly when their effective edits, the weights of the SAEs they use and
    the users' own salts agree. Where a spec treats prompt and generation differently, what a block
    holds also depends on where the prompt ended, so the prompt's length is part of the salt.
    A request that edits nothing (it may read) shares with unsteered ones.

    Args:
        spec: the validated field.
        checksums: SHA-256 of the weights of each SAE in ``spec.saes``.
        prompt_len: tokens in the prompt.
        user_salt: what `unsteered_salt` makes of the request's own ``cache_salt``.

    Returns:
        64 hexadecimal digits, or ``user_salt`` unchanged if there is no edit.
    """
    if not spec.edits:
        return user_salt
    parts = [
        spec.canonical().decode(),
        sorted((name, checksums[name]) for name in spec.saes),
        prompt_len if spec.phase_dependent else None,
        user_salt,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def unsteered_salt(user_salt: str | None) -> str | None:
    """A user's own salt, or another where it could be one of ours.

    All that ours are made of is public, so a client could otherwise name one and be served, or
    leave behind, blocks of a stream that was edited otherwise than its request asks for.
    """
    if user_salt is None or not _OURS.fullmatch(user_salt):
        return user_salt
    return hashlib.sha256(f"unsteered {user_salt}".encode()).hexdigest()


_OURS = re.compile("[0-9a-f]{64}")
