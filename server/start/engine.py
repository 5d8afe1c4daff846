"""What makes vLLM's engine steer, and why it did not start."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from server.start.checked_sae import CheckedSAE, check_fit
from server.start.errors import EngineStartError, RefusedStartError
from server.start.flags import ServerOptions
from steering.config import REFUSAL_VARIABLE, SteeringConfig
from steering.request.special_tokens import special_token_ids
from steering.vllm.engine_arguments import engine_arguments
from steering.vllm.start_failure import FAILURE_VARIABLE
from steering.vllm.support import UnsupportedEngineError

#: If an engine did not start, Python warns of its shared memory after everything else is said.
QUIET_END: Final = "ignore:resource_tracker:UserWarning"


def steering_arguments(
    checked: Sequence[CheckedSAE], vllm_config: Any, options: ServerOptions
) -> dict[str, Any]:
    """The arguments that make an engine of this configuration steer through these SAEs.

    Raises:
        SAEError: if an SAE does not fit the model.
        RefusedStartError: if the engine cannot be steered.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    from steering.vllm.support import refuse_unsupported

    d_model, num_layers = check_fit(checked, vllm_config.model_config)
    try:
        refuse_unsupported(vllm_config)
        model = vllm_config.model_config
        tokenizer = cached_tokenizer_from_config(model)
        config = SteeringConfig(
            saes=tuple(sae.reference for sae in checked),
            d_model=d_model,
            num_layers=num_layers,
            special_token_ids=special_token_ids(tokenizer, model.hf_config),
            max_rows=options.max_rows,
            max_read_values=options.max_read_values,
            resident=options.resident,
        )
        return engine_arguments(config)
    except UnsupportedEngineError as error:
        raise RefusedStartError(str(error)) from error


@contextmanager
def naming_the_cause() -> Iterator[None]:
    """Turn the failure of an engine's processes into one line that says why.

    vLLM logs a traceback in each of its processes and raises something that points at them.

    Raises:
        RefusedStartError: if a worker has written down why it cannot be steered.
        EngineStartError: if another exception ended a process of the engine.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-sae-") as folder:
        refusal, failure = Path(folder) / "refusal", Path(folder) / "failure"
        warnings = filter(None, (QUIET_END, os.environ.get("PYTHONWARNINGS")))
        variables = {
            REFUSAL_VARIABLE: str(refusal),
            FAILURE_VARIABLE: str(failure),
            "PYTHONWARNINGS": ",".join(warnings),
        }
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        except Exception as error:
            if refusal.is_file():
                raise RefusedStartError(refusal.read_text().strip()) from error
            if failure.is_file():
                raise EngineStartError(failure.read_text().strip()) from error
            raise
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
