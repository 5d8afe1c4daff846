"""What an SAE is, without its weights. Torch-free: a server holds cards, workers hold weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sae.errors import SAEError

# If a layer normalizes or scales a branch before it adds it to the stream, hook_mlp_out and
# hook_attn_out are what is added, and mlp.hook_out and attn.hook_out the module's own output. In
# most models the two are the same.
HOOK_KINDS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_mlp_out",
    "hook_attn_out",
    "mlp.hook_out",
    "attn.hook_out",
    "attn.hook_z",
    "ln2.hook_normalized",
    "mlp.hook_in",
)
# The outputs of attention's heads, side by side: as wide as the heads, not as the stream.
HEADS = "attn.hook_z"
# Places where activations can be read and nothing can be added: the output of the norm before the
# MLP without the norm's gain and bias, and what the MLP is given.
READ_ONLY_KINDS = ("ln2.hook_normalized", "mlp.hook_in")

# What a dictionary is, by where it reads and where it writes. A crosscoder is one of its slots.
KIND_SAE = "sae"
KIND_TRANSCODER = "transcoder"
KIND_CLT = "clt"
KIND_CROSSCODER = "crosscoder"
KIND_DIRECTION = "direction"
#: Kinds for which `error_term: false` is defined: their decoder's output can stand in for what is
#: at one place.
KINDS_THAT_DECODE = (KIND_SAE, KIND_TRANSCODER)

# The unit an activation is in. Libraries that fold the norm of the decoder row into the encoder
# report f_i * |W_dec_i|; the others report f_i as it multiplies the decoder row.
UNIT_PLAIN = "activation"
UNIT_TIMES_DECODER_NORM = "activation_times_decoder_norm"

_HOOK_POINT = re.compile(r"blocks\.(\d{1,5})\.([\w.]+)", re.ASCII)


@dataclass(frozen=True)
class HookPoint:
    """A place in the model, named as the field names it: `blocks.15.hook_resid_post`."""

    layer: int
    kind: str

    @classmethod
    def parse(cls, name: str) -> HookPoint:
        """Parse a name of the form that `str` writes. Raises SAEError for any other.

        `sae.hook_names.parse_hook` takes what files and users write.
        """
        match = _HOOK_POINT.fullmatch(name)
        if match is None or match.group(2) not in HOOK_KINDS:
            raise SAEError(
                f"unknown hook point {name!r}: expected blocks.LAYER.KIND with KIND one of "
                f"{', '.join(HOOK_KINDS)}"
            )
        return cls(layer=int(match.group(1)), kind=match.group(2))

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{self.kind}"


@dataclass(frozen=True)
class SAECard:
    """An SAE's public description, and what its arithmetic needs to know beside the weights.

    `exact_from_row` says whether one latent's encoder row is enough for its activation.
    `reads` and `writes` are the hook points at which activations are read and edits added; left
    out, both are `hook`, as for every SAE. `hook` is the first of `writes`. `d_in` is the width of
    the place where it reads, `d_out` that of the places where it writes; left out, it is `d_in`.
    """

    id: str
    hook: str
    layer: int
    architecture: str
    d_in: int
    d_sae: int
    dtype: str
    source: str
    format: str
    sha256: str | None
    sink_norm: float | None
    error_term: bool
    has_labels: bool
    has_max_activations: bool
    k: int | None = None
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    activation_unit: str = UNIT_PLAIN
    kind: str = KIND_SAE
    reads: str = ""
    writes: tuple[str, ...] = ()
    d_out: int = 0

    def __post_init__(self) -> None:
        # The fields of a frozen dataclass are set this way while it is made.
        if not self.reads:
            object.__setattr__(self, "reads", self.hook)
        if not self.writes:
            object.__setattr__(self, "writes", (self.hook,))
        if not self.d_out:
            object.__setattr__(self, "d_out", self.d_in)

    @property
    def one_place(self) -> bool:
        """Whether edits are added where activations are read, and nowhere else."""
        return self.writes == (self.reads,)

    @property
    def exact_from_row(self) -> bool:
        """False for top-k architectures: a latent's activation depends on all the others."""
        return self.architecture not in ("topk", "abstopk")

    @property
    def signed(self) -> bool:
        """Whether activations may be negative."""
        return self.architecture in ("abstopk", "direction")

    def to_json(self) -> dict[str, Any]:
        """The card as the HTTP API shows it."""
        return {
            "id": self.id,
            "object": "sae",
            "kind": self.kind,
            "hook": self.hook,
            "reads": self.reads,
            "writes": list(self.writes),
            "layer": self.layer,
            "architecture": self.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": self.dtype,
            "source": self.source,
            "format": self.format,
            "sha256": self.sha256,
            "sink_norm": self.sink_norm,
            "error_term": self.error_term,
            "has_labels": self.has_labels,
            "has_max_activations": self.has_max_activations,
        }
