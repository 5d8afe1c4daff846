"""The prefix-cache salt: who may share KV blocks with whom."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Final

from steering.request.spec import SteeringSpec

#: Raised whenever an edit's arithmetic changes what the KV cache holds: a store may outlive us.
ARITHMETIC_VERSION: Final = 3


def cache_salt(
    spec: SteeringSpec,
    fingerprints: Mapping[str, str],
    prompt_len: int,
    user_salt: str | None,
) -> str | None:
    """The salt under which a request's KV blocks are stored.

    Requests share blocks exactly when their effective edits, the SAEs they use and the users' own
    salts agree. Where what happens to a token depends on where the prompt ends, so does what a
    block holds, and the prompt's length is part of the salt; negative positions are made positions
    from the prompt's start before. A request that edits nothing (it may read, or stop) shares with
    unsteered ones.

    Args:
        spec: the validated field.
        fingerprints: of each SAE in ``spec.kv_saes``, see `Catalog.prepare_now`.
        prompt_len: tokens in the prompt.
        user_salt: what `unsteered_salt` makes of the request's own ``cache_salt``.

    Returns:
        64 hexadecimal digits, or ``user_salt`` unchanged if there is no edit.

    Raises:
        SteeringError: ``duplicate_intervention``, see `SteeringSpec.at`.
    """
    spec = spec.at(prompt_len)
    if all(edit.positions.empty for edit in spec.edits):
        return user_salt
    parts = [
        ARITHMETIC_VERSION,
        spec.canonical().decode(),
        sorted((name, fingerprints[name]) for name in spec.kv_saes),
        prompt_len if spec.phase_dependent else None,
        user_salt,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def unsteered_salt(user_salt: str | None) -> str | None:
    """A user's own salt, or another if it could be one of ours.

    All that ours are made of is public, so a client could otherwise name one and be served, or
    leave behind, blocks of a stream that was edited otherwise than its request asks for.
    """
    if user_salt is None or not _OURS.fullmatch(user_salt):
        return user_salt
    return hashlib.sha256(f"unsteered {user_salt}".encode()).hexdigest()


_OURS = re.compile("[0-9a-f]{64}")
