"""Dictionaries of kinds that are not served, told by names before their weights are fetched.

What only configurations or tensors show is refused by `sae.formats.unserved`. Torch-free.
"""

from __future__ import annotations

import re
from typing import Final

from sae.errors import SAEError

_NOT_IN_WORD: Final = r"(?<![a-z]){}(?![a-z])"


def _word(pattern: str) -> re.Pattern[str]:
    return re.compile(_NOT_IN_WORD.format(pattern), re.IGNORECASE)


#: What cannot be served at all, told by a word in its names, and why.
_UNSERVED: Final = {
    "a Lorsa (low-rank sparse attention)": (_word("lorsas?"), "which attends over the sequence"),
    "an SAE of mlsae": (_word("mlsaes?"), "which reads every layer at once"),
}
#: An organization's CLTs choose their top k over all layers together.
_JOINT_TOP_K: Final = re.compile(r"(?i)(?:^|/)bytedance-seed/[^/]*(?<![a-z])clt(?![a-z])")

#: What is no SAE, told by a word in its names.
_OTHER_KINDS: Final = {
    "a cross-layer transcoder": _word("clts?"),
    "a transcoder": _word("transcoders?"),
    "a crosscoder": _word("crosscoders?"),
}
_SAE_WORD: Final = _word("saes?")


def refuse_by_name(source: str, path: str, *names: str) -> None:
    """Refuse a source whose names say that it is of a kind that is not served.

    Args:
        source: what the message names.
        path: the repository and the path in it, or the last folders of a path on disk.
        names: other names of it.

    Raises:
        SAEError: if it is one.
    """
    if _JOINT_TOP_K.search(path):
        raise SAEError(
            f"{source}: by its name this is a cross-layer transcoder of ByteDance, which chooses "
            "its top k over all layers together: no layer knows its features before the last one"
        )
    for part in (*names, *reversed(path.split("/"))):
        for what, (pattern, why) in _UNSERVED.items():
            if pattern.search(part):
                raise SAEError(f"{source}: by its name ({part!r:.80}) this is {what}, {why}")


def refuse_word_of_another_kind(where: str, path: str, source: str) -> None:
    """Refuse what states no hook point and has names that say that it is no SAE.

    Args:
        where: what the message names.
        path: folders around it, the nearest last.
        source: what the user wrote, for the message.

    Raises:
        SAEError: if it is no SAE. The message says how to state a transcoder's places.
    """
    for part in reversed(path.split("/")):
        # A folder of SAEs in a collection of both.
        if _SAE_WORD.search(part) is not None:
            return
        for what, pattern in _OTHER_KINDS.items():
            if pattern.search(part):
                raise SAEError(
                    f"{where}: by its name ({part!r:.80}) this is {what}, which reads at one place "
                    f"and writes at another, and its files do not say where; state it as {source},"
                    "reads=blocks.LAYER.mlp.hook_in,writes=blocks.LAYER.hook_mlp_out"
                )
