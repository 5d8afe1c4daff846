"""What the command line hands down to every process, inside vLLM's ``additional_config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sae.source import ResolvedSAE
from steering.request.limits import MAX_GATES, MAX_INTERVENTIONS, MAX_TOP_K

#: Key of this project's part of ``additional_config``, which vLLM's compile hash covers.
CONFIG_KEY: Final = "steering"
DEFAULT_MAX_ROWS: Final = 4096
#: By default one request may have at least so many features read; see `SteeringConfig.read_limit`.
LEAST_MAX_READ_VALUES: Final = 2**22
#: An accelerator holds the whole weights of every TopK SAE, and of one of the others at a time.
RESIDENT_TURNS: Final = "turns"
#: An accelerator holds the whole weights of every SAE.
RESIDENT_ALL: Final = "all"
#: An accelerator holds no SAE's whole weights, and requests that need all of one are refused.
RESIDENT_NONE: Final = "none"
RESIDENT_CHOICES: Final = (RESIDENT_TURNS, RESIDENT_ALL, RESIDENT_NONE)
#: Environment variable that names a file: a worker that cannot install steering writes why there.
REFUSAL_VARIABLE: Final = "STEERING_REFUSAL_FILE"


@dataclass(frozen=True)
class SteeringConfig:
    """The SAEs to serve and the size of what is kept on the device.

    Attributes:
        saes: the SAEs; their order gives each its index.
        d_model: hidden size of the served model.
        num_layers: number of decoder layers of the served model.
        special_token_ids: tokens that edits leave alone unless ``special_tokens`` is asked for;
            None means those of the model's tokenizer.
        max_rows: how many features may be in use at once over all running requests.
        max_read_values: how many features one request may have read, over all its tokens; None
            means whatever one choice may ask for, and at least `LEAST_MAX_READ_VALUES`.
        resident: which SAEs an accelerator holds whole, one of `RESIDENT_CHOICES`.

    Raises:
        ValueError: if ``max_rows`` or ``max_read_values`` is too small for one request, or if
            ``resident`` is not one of `RESIDENT_CHOICES`.
    """

    saes: tuple[ResolvedSAE, ...]
    d_model: int
    num_layers: int
    special_token_ids: tuple[int, ...] | None = None
    max_rows: int = DEFAULT_MAX_ROWS
    max_read_values: int | None = None
    resident: str = RESIDENT_TURNS

    def __post_init__(self) -> None:
        if self.max_rows < MAX_INTERVENTIONS:
            raise ValueError(
                f"max_rows {self.max_rows} is less than the {MAX_INTERVENTIONS} features that one "
                "request may name"
            )
        if self.max_read_values is not None and self.max_read_values < MAX_TOP_K:
            raise ValueError(
                f"max_read_values {self.max_read_values} is less than the {MAX_TOP_K} features "
                "that one token may have read"
            )
        if self.resident not in RESIDENT_CHOICES:
            raise ValueError(f"resident {self.resident!r} is none of {', '.join(RESIDENT_CHOICES)}")

    @property
    def row_capacity(self) -> int:
        """Rows on the device: a request's edits and conditions together always fit."""
        return max(self.max_rows, MAX_INTERVENTIONS + MAX_GATES)

    def read_limit(self, max_model_len: int) -> int:
        """How many features one request may have read if a context has ``max_model_len`` tokens."""
        if self.max_read_values is not None:
            return self.max_read_values
        return max(LEAST_MAX_READ_VALUES, MAX_TOP_K * max_model_len)

    def to_dict(self) -> dict[str, Any]:
        """The configuration in plain JSON types, as ``additional_config`` wants them."""
        special = self.special_token_ids
        return {
            "saes": [ref.to_dict() for ref in self.saes],
            "d_model": self.d_model,
            "num_layers": self.num_layers,
            "special_token_ids": None if special is None else list(special),
            "max_rows": self.max_rows,
            "max_read_values": self.max_read_values,
            "resident": self.resident,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> SteeringConfig:
        """The inverse of :meth:`to_dict`."""
        special = raw["special_token_ids"]
        return cls(
            saes=tuple(ResolvedSAE.from_dict(ref) for ref in raw["saes"]),
            d_model=raw["d_model"],
            num_layers=raw["num_layers"],
            special_token_ids=None if special is None else tuple(special),
            max_rows=raw["max_rows"],
            max_read_values=raw["max_read_values"],
            resident=raw["resident"],
        )

    @classmethod
    def from_additional_config(cls, additional: object) -> SteeringConfig | None:
        """The steering part of vLLM's ``additional_config``; None if there is none."""
        if isinstance(additional, Mapping) and CONFIG_KEY in additional:
            return cls.from_dict(additional[CONFIG_KEY])
        return None


def __getattr__(name: str) -> Any:
    # Version 0.1 had this function here, so it can still be imported from here.
    if name == "engine_arguments":
        from steering.vllm.engine_arguments import engine_arguments

        return engine_arguments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
