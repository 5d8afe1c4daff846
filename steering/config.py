"""What the command line hands down to every process, inside vLLM's ``additional_config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sae.source import ResolvedSAE
from steering.spec import MAX_INTERVENTIONS, MAX_TOP_K

#: Key of this project's part of ``additional_config``; being there, it enters vLLM's compile hash.
CONFIG_KEY: Final = "steering"
DEFAULT_MAX_ROWS: Final = 4096
#: At least as many features as this may be read by one request; and `MAX_TOP_K` over one context.
LEAST_MAX_READ_VALUES: Final = 2**22
#: Environment variable naming a file for the reason why a worker could not install steering.
REFUSAL_VARIABLE: Final = "STEERING_REFUSAL_FILE"


@dataclass(frozen=True)
class SteeringConfig:
    """The SAEs to serve and the size of what is kept on the device.

    Attributes:
        saes: their order gives each SAE its index.
        d_model: hidden size of the served model.
        num_layers: number of decoder layers of the served model.
        special_token_ids: tokens that edits leave alone unless ``special_tokens`` is asked for;
            None for those of the model's tokenizer.
        max_rows: how many features may be in use at once over all running requests.
        max_read_values: how many features one request may have read, over all its tokens; None for
            `LEAST_MAX_READ_VALUES` or, where that is more, whatever one choice may ask for.
    """

    saes: tuple[ResolvedSAE, ...]
    d_model: int
    num_layers: int
    special_token_ids: tuple[int, ...] | None = None
    max_rows: int = DEFAULT_MAX_ROWS
    max_read_values: int | None = None

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

    def read_limit(self, max_model_len: int) -> int:
        """How many features one request may have read, where a context has so many tokens."""
        if self.max_read_values is not None:
            return self.max_read_values
        return max(LEAST_MAX_READ_VALUES, MAX_TOP_K * max_model_len)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as ``additional_config`` wants them."""
        return {
            "saes": [ref.to_dict() for ref in self.saes],
            "d_model": self.d_model,
            "num_layers": self.num_layers,
            "special_token_ids": self.special_token_ids and list(self.special_token_ids),
            "max_rows": self.max_rows,
            "max_read_values": self.max_read_values,
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
        )

    @classmethod
    def from_additional_config(cls, additional: object) -> SteeringConfig | None:
        """The steering part of vLLM's ``additional_config``, None where there is none."""
        if isinstance(additional, Mapping) and CONFIG_KEY in additional:
            return cls.from_dict(additional[CONFIG_KEY])
        return None


def engine_arguments(config: SteeringConfig) -> dict[str, Any]:
    """Arguments that make a vLLM engine steer: ``LLM(model, **engine_arguments(config))``.

    The hook points stand in the files, which may change under one path; a graph compiled for
    others must not be taken from vLLM's cache, so they enter its hash beside the paths.

    Raises:
        UnsupportedEngineError: where the installed vLLM is not one that can be steered.
        SAEError: if an SAE's file does not hold what it should.
    """
    from sae.sae import open_sae
    from steering.vllm.seams import refuse_missing_seams

    refuse_missing_seams()
    hook_points = sorted({open_sae(ref).card.hook for ref in config.saes})
    return {
        "worker_cls": "steering.vllm.worker.SteeringWorker",
        "scheduler_cls": "steering.vllm.scheduler.SteeringScheduler",
        "additional_config": {CONFIG_KEY: {**config.to_dict(), "hook_points": hook_points}},
    }
