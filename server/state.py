"""What the routes of one API server process share."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import State
from starlette.requests import Request

from server.feature_details import FeatureDetails
from server.metrics import WorkerSeries
from server.presets.models import PresetModels
from server.presets.store import PresetStore
from steering.request.catalog import Catalog
from steering.studies.progress import Progress
from steering.studies.study import MAX_STUDY_TOKENS, Context
from steering.studies.texts import Tokens
from steering.vllm.reader import Reader


@dataclass(frozen=True)
class SteeringState:
    """The SAEs, what is computed about their features, the workers' numbers, and the reader.

    `worker_series` and `max_body_bytes` are None if no SAE is loaded: plain vLLM workers have no
    numbers, and plain vLLM reads any body.
    """

    catalog: Catalog
    details: FeatureDetails
    worker_series: WorkerSeries | None
    max_body_bytes: int | None = None
    running_reader: Reader | None = None
    presets: PresetStore | None = None
    served: PresetModels | None = None
    vocabulary: Tokens | None = None
    max_study_tokens: int = MAX_STUDY_TOKENS

    @property
    def reader(self) -> Reader:
        """What runs texts; there is one as soon as the engine runs."""
        assert self.running_reader is not None, "the engine does not run yet"
        return self.running_reader

    @property
    def preset_store(self) -> PresetStore:
        """The presets; there is a store as soon as the engine runs."""
        assert self.presets is not None, "the engine does not run yet"
        return self.presets

    @property
    def models(self) -> PresetModels:
        """The served models, presets among them; they are there as soon as the engine runs."""
        assert self.served is not None, "the engine does not run yet"
        return self.served

    def context(self, progress: Progress) -> Context:
        """What a study is given to run with.

        Args:
            progress: where the study tells how far it is.

        Raises:
            SteeringError: if no SAE is loaded.
        """
        assert self.vocabulary is not None, "the engine does not run yet"
        return Context(
            *(self.catalog, self.reader, self.vocabulary, self.max_study_tokens, progress),
            unembedding=self.details.unembedding,
        )

    def attach(self, state: State) -> None:
        """Make it the state of an app."""
        state.steering = self


def steering_state(request: Request) -> SteeringState:
    """The state of the app that serves `request`."""
    state = request.app.state.steering
    assert isinstance(state, SteeringState)
    return state
