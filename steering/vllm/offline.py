"""Steering without a server: vLLM's own ``LLM``, with SAEs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from vllm import LLM, EngineArgs, SamplingParams

from steering.config import CONFIG_KEY, DEFAULT_MAX_ROWS, RESIDENT_TURNS
from steering.report import response_object, wants_report
from steering.request.accepted import Accepted, accept
from steering.request.catalog import Catalog
from steering.studies.progress import Listener
from steering.studies.study import MAX_STUDY_TOKENS
from steering.vllm.door import FIELD, accepted_of, carrying, catalog_for
from steering.vllm.engine_arguments import engine_arguments, offline_config
from steering.vllm.offline_studies import OfflineStudies
from steering.vllm.plugin import register
from steering.vllm.results import results_of

#: The ``steering`` field of one request.
Field = Mapping[str, Any]


class SteeringLLM(LLM):
    """vLLM's ``LLM`` with SAEs: each request may steer, and its output says what that did.

    ``generate`` and ``chat`` take the field ``steering`` of the HTTP routes: either one for all
    prompts, or a list with one, or None, for each prompt. Every output has ``output.steering``:
    what an HTTP response would have as ``steering``, or None if the request asked for neither
    report nor read.

    Args:
        model: as for ``LLM``.
        saes: each as ``--sae`` takes it: ``["l14=path/to/sae"]``.
        max_rows: how many features may be in use at once over all running requests.
        max_read_values: how many features one request may have read, over all its tokens.
        max_study_tokens: how many tokens one study may send through the model.
        resident: which SAEs a GPU holds whole, as ``--steering-resident``.
        engine_args: all other arguments of ``LLM``.

    Raises:
        SAEError: if an SAE cannot be used, or cannot be used with this model.
        UnsupportedEngineError: if this vLLM cannot be steered.
        ValueError: if ``additional_config`` holds the key that this project uses.
    """

    def __init__(
        self,
        model: str,
        saes: Sequence[str],
        *,
        max_rows: int = DEFAULT_MAX_ROWS,
        max_read_values: int | None = None,
        max_study_tokens: int = MAX_STUDY_TOKENS,
        resident: str = RESIDENT_TURNS,
        **engine_args: Any,
    ) -> None:
        register()  # vLLM goes on without a plugin that failed to load
        config = offline_config(
            saes,
            _model_config(model, engine_args),
            max_rows=max_rows,
            max_read_values=max_read_values,
            resident=resident,
        )
        steered = engine_arguments(config)
        given = engine_args.pop("additional_config", None) or {}
        if CONFIG_KEY in given:
            raise ValueError(
                f"additional_config: the key {CONFIG_KEY!r} is set by SteeringLLM; leave it out"
            )
        steered["additional_config"] = {**given, **steered["additional_config"]}
        super().__init__(model, **engine_args, **steered)
        self._studies = OfflineStudies(self, max_study_tokens)

    @property
    def catalog(self) -> Catalog:
        """The SAEs: their cards, and their features' labels and statistics."""
        return catalog_for(self.llm_engine.vllm_config)

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        steering: Field | Sequence[Field | None] | None = None,
        **options: Any,
    ) -> list[Any]:
        """As ``LLM.generate``; see the class for ``steering``.

        Raises:
            ValueError: if a field is not valid, before anything runs.
        """
        params = self._steered(sampling_params, steering)
        return self._with_reports(super().generate(prompts, params, **options), params)

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        steering: Field | Sequence[Field | None] | None = None,
        **options: Any,
    ) -> list[Any]:
        """As ``LLM.chat``; see the class for ``steering``.

        Raises:
            ValueError: if a field is not valid, before anything runs.
        """
        params = self._steered(sampling_params, steering)
        return self._with_reports(super().chat(messages, params, **options), params)

    def evaluate(self, body: Field, progress: Listener | None = None) -> dict[str, Any]:
        """What POST /v1/steering/evaluate answers: what edits do to texts.

        Args:
            body: the body as the route takes it.
            progress: called with the number of steps that are done, and of how many.

        Raises:
            SteeringError: a ValueError, with the code and the path of what is wrong.
        """
        return self._studies.run("evaluate", body, progress=progress)

    def calibrate(self, body: Field, progress: Listener | None = None) -> dict[str, Any]:
        """What POST /v1/steering/calibrate answers: how strong an edit may be. See `evaluate`."""
        return self._studies.run("calibrate", body, progress=progress)

    def contrast(self, sae: str, body: Field, progress: Listener | None = None) -> dict[str, Any]:
        """What POST /v1/saes/{sae}/contrast answers: features that tell texts apart.

        See `evaluate` for the arguments.
        """
        return self._studies.run("contrast", body, sae, progress)

    def rank(self, sae: str, body: Field, progress: Listener | None = None) -> dict[str, Any]:
        """What POST /v1/saes/{sae}/rank answers: what features do to the next token.

        See `evaluate` for the arguments.
        """
        return self._studies.run("rank", body, sae, progress)

    def attribute(self, sae: str, body: Field, progress: Listener | None = None) -> dict[str, Any]:
        """What POST /v1/saes/{sae}/attribute answers: the features behind a text.

        See `evaluate` for the arguments.
        """
        return self._studies.run("attribute", body, sae, progress)

    def suggest(self, body: Field, progress: Listener | None = None) -> dict[str, Any]:
        """What POST /v1/steering/suggest answers: an edit that favours what is wanted.

        See `evaluate` for the arguments.
        """
        return self._studies.run("suggest", body, progress=progress)

    def forecast(self, body: Field, progress: Listener | None = None) -> dict[str, Any]:
        """What POST /v1/steering/forecast answers: an edit, judged by the weights alone.

        See `evaluate` for the arguments.
        """
        return self._studies.run("forecast", body, progress=progress)

    def _steered(
        self, given: Any, steering: Field | Sequence[Field | None] | None
    ) -> SamplingParams | list[SamplingParams]:
        """The sampling parameters, each carrying its field as it was accepted.

        Raises:
            ValueError: if a field is not valid, or there are not as many fields as parameters.
        """
        if given is None:
            given = self.get_default_sampling_params()
        # Anything but a list of fields is one field, which is refused if it is none.
        if isinstance(steering, str) or not isinstance(steering, Sequence):
            if isinstance(given, SamplingParams):
                return self._carrying(given, steering)
            return [self._carrying(params, steering) for params in given]
        if isinstance(given, SamplingParams):
            given = [given] * len(steering)
        return [
            self._carrying(params, field) for params, field in zip(given, steering, strict=True)
        ]

    def _carrying(self, params: SamplingParams, steering: Field | None) -> SamplingParams:
        field = steering if steering is not None else (params.extra_args or {}).get(FIELD)
        if field is None:
            return params
        accepted = field if isinstance(field, Accepted) else accept(field, self.catalog)
        # `_with_reports` fetches all of them, so none may be dropped, however many there are.
        return carrying(params, replace(accepted, awaited=wants_report(accepted.spec)))

    def _with_reports(self, outputs: list[Any], params: Any) -> list[Any]:
        params_of = params if isinstance(params, list) else [params] * len(outputs)
        for output, sampling_params in zip(outputs, params_of, strict=True):
            accepted = accepted_of(sampling_params)
            output.steering = None
            if accepted is not None and wants_report(accepted.spec):
                reports = results_of(self, output)
                output.steering = response_object(reports, accepted.spec.report)
        return outputs


def _model_config(model: str, engine_args: Mapping[str, Any]) -> Any:
    known = {field.name for field in fields(EngineArgs)}
    args = {name: value for name, value in engine_args.items() if name in known}
    return EngineArgs(model=model, **args).create_model_config()
