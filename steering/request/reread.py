"""What ``match: "reread"`` and ``protect`` require of a request's edits and SAEs.

Both need pre-activations that are affine in the stream that is edited, p = W_enc x + b, at a hook
point that no other SAE of the request edits.
"""

from __future__ import annotations

from collections.abc import Sequence

from steering.errors import SteeringError
from steering.request.edits import Edit
from steering.request.facts import SAEs, named_feature, named_sae
from steering.request.shape import FeatureShape

_MATCH = "steering.match"


def refuse_reread(edits: Sequence[Edit], error_term: bool, saes: SAEs) -> None:
    """Refuse edits that cannot be solved together.

    Raises:
        SteeringError: ``unsupported_op`` if an SAE's pre-activations are not affine in the stream
            or ``error_term`` is false; ``unsupported_combination`` if edits of one SAE differ in
            positions or conditions, or if two SAEs edit one hook point.
    """
    first: dict[str, Edit] = {}
    for i, edit in enumerate(edits):
        _refuse_sae(edit.sae, edits, error_term, saes, "match reread", _MATCH)
        other = first.setdefault(edit.sae, edit)
        if (other.positions, other.when) != (edit.positions, edit.when):
            raise SteeringError(
                "unsupported_combination",
                f"match reread solves all edits of SAE {edit.sae!r} together, so intervention {i} "
                "needs the positions and the conditions of the first of them",
                _MATCH,
            )


def parse_protect(
    raw: Sequence[FeatureShape], edits: Sequence[Edit], error_term: bool, saes: SAEs
) -> tuple[tuple[str, int], ...]:
    """The protected (SAE, feature) pairs, distinct, in the order of the request.

    Raises:
        SteeringError: with the code and path of what is wrong, if something is.
    """
    edited = {(edit.sae, edit.feature) for edit in edits}
    found: dict[tuple[str, int], None] = {}
    for i, item in enumerate(raw):
        path = f"steering.protect[{i}]"
        name = named_sae(item.sae, f"{path}.sae", saes)
        feature = named_feature(item.feature, path, saes[name])
        if all(edit.sae != name for edit in edits):
            raise SteeringError(
                "invalid_value", f"no intervention edits SAE {name!r}: nothing to protect", path
            )
        _refuse_sae(name, edits, error_term, saes, "protect", path)
        if (name, feature) in edited:
            raise SteeringError(
                "unsupported_combination",
                f"feature {feature} of SAE {name!r} is both edited and protected",
                path,
            )
        found[name, feature] = None
    return tuple(found)


def _refuse_sae(
    name: str, edits: Sequence[Edit], error_term: bool, saes: SAEs, what: str, path: str
) -> None:
    sae = saes[name]
    if not sae.affine:
        raise SteeringError(
            "unsupported_op",
            f"{what} is for standard and jumprelu SAEs without normalization of each token, and "
            f"for directions; SAE {name!r} is none of these",
            path,
        )
    if not error_term:
        raise SteeringError("unsupported_op", f"{what} needs error_term true", path)
    for edit in edits:
        if edit.sae != name and sae.hook in saes[edit.sae].writes:
            raise SteeringError(
                "unsupported_combination",
                f"{what} needs one SAE at a hook point, but SAEs {name!r} and {edit.sae!r} both "
                f"edit {sae.hook}",
                path,
            )
