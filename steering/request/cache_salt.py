"""The prefix-cache salt: who may share KV blocks with whom."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Final

from steering.request.spec import SteeringSpec

#: Increase it with every change of the edits' arithmetic that changes what the KV cache holds: a
#: store of cache blocks may outlive the process that filled it.
ARITHMETIC_VERSION: Final = 3


def cache_salt(
    spec: SteeringSpec,
    fingerprints: Mapping[str, str],
    prompt_len: int,
    user_salt: str | None,
) -> str | None:
    """The salt under which a request's KV blocks are stored.

    Requests share blocks exactly when their effective edits, the SAEs these use and the users' own
    salts agree. If what happens to a token depends on where the prompt ends, so does what a block
    holds, and then the prompt's length is part of the salt. Negative positions are first turned
    into positions from the prompt's start. A request that edits nothing (it may read, or stop)
    shares with unsteered ones.

    Args:
        spec: the validated field.
        fingerprints: the fingerprint of each SAE in ``spec.kv_saes``; see `Catalog.prepare_now`.
        prompt_len: tokens in the prompt.
        user_salt: what `unsteered_salt` makes of the request's own ``cache_salt``.

    Returns:
        64 hexadecimal digits, or ``user_salt`` unchanged if there is no edit.

    Raises:
        SteeringError: ``duplicate_intervention`` if two edits meet in a prompt of this length; see
            `SteeringSpec.at`.
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
    """A user's own salt, or its hash if it could be a steered request's.

    Everything that a steered request's salt is made of is public. So a client could otherwise name
    such a salt and be served blocks whose stream was edited, or leave behind unedited ones.
    """
    if user_salt is None or not _STEERED_SALT.fullmatch(user_salt):
        return user_salt
    return hashlib.sha256(f"unsteered {user_salt}".encode()).hexdigest()


_STEERED_SALT = re.compile("[0-9a-f]{64}")
