"""The `vllm.endpoint_plugins` entry point: steering in vLLM's API server."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from server import errors, self_check
from server.body_limit import BodyLimit
from server.feature_details import FeatureDetails
from server.metrics import WorkerSeries, start_series
from server.middleware import ForeignSteering, MetricsRefresh, PresetNames
from server.presets.models import PresetModels, taken_names
from server.presets.store import open_store
from server.rendering import ServedVocabulary
from server.routes import features, generate, inspect, presets, saes, studies, studio
from server.start import engine_death
from server.start.flags import ServerOptions
from server.state import SteeringState
from steering.request.catalog import SCAN_LIMIT_BYTES, Catalog
from steering.unembedding import open_unembedding
from steering.vllm.door import catalog_for
from steering.vllm.giving_way import giving_way
from steering.vllm.plugin import register
from steering.vllm.reader import Reader
from steering.vllm.results import worker_stats


class SteeringEndpointPlugin:
    """Adds the SAE routes, and replaces the generating routes by ones that take `steering`.

    It is on without SAEs too, to refuse steering rather than ignore it.
    """

    name = "vllm_sae"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add routes and middlewares; vLLM calls it after its own routes, before its middlewares.

        vLLM's middlewares go around ours, so `--api-key` is asked for first.
        """
        # vLLM goes on without a general plugin that failed to load, and steering would be dropped.
        register()
        generate.attach(app)
        for resource in (
            presets,
            features,
            inspect,
            studies,
            saes,
        ):  # the last has a path that takes all others
            app.include_router(resource.router)
        # Only our own command has the flag; plain vLLM is left as it is.
        if getattr(app.state.args, "steering_studio", False):
            app.include_router(studio.router)
        app.add_middleware(ForeignSteering)
        app.add_middleware(PresetNames)
        app.add_middleware(BodyLimit)  # around the one before, which reads whole bodies
        app.add_middleware(MetricsRefresh)
        errors.install(app)
        SteeringState(Catalog({}), FeatureDetails(lambda: None), None).attach(app.state)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Make the routes' state; vLLM calls it once the engine runs.

        Args:
            engine_client: None if vLLM runs as a renderer, without an engine.
            state: the app's, in which vLLM has put its handlers.
            args: the flags of the command line.
        """
        if engine_client is None:
            return
        engine_death.watch(engine_client)
        catalog = catalog_for(engine_client.vllm_config)
        for name in catalog.names:
            await asyncio.to_thread(catalog.features(name).load)
        tokenizer = getattr(engine_client.renderer, "tokenizer", None)
        details = FeatureDetails(partial(open_unembedding, engine_client.model_config, tokenizer))
        series = WorkerSeries(partial(worker_stats, engine_client)) if catalog.names else None
        options = ServerOptions.of(args)
        limit = options.max_body_bytes if catalog.names else None
        served = state.openai_serving_models
        store = await asyncio.to_thread(open_store, options, catalog, partial(taken_names, served))
        models = PresetModels(served, store)
        if store.in_use:
            models.install()
        reader = Reader(engine_client, way=giving_way(engine_client, options.study_share))
        vocabulary = ServedVocabulary(
            engine_client.renderer, getattr(state, "openai_serving_chat", None)
        )
        SteeringState(
            *(catalog, details, series, limit, reader, store, models),
            vocabulary=vocabulary,
            max_study_tokens=options.max_study_tokens,
        ).attach(state)
        start_series(catalog.names, (preset.name for preset in store.all()))
        # Only our own command has the flag; plain vLLM is left as it is.
        wanted = getattr(args, "steering_self_check", False)
        if series is not None and wanted is not False:
            # The gauges have their values before a scrape might find the workers busy.
            await series.refresh()
            self_check.start(engine_client, max_bytes=None if wanted else SCAN_LIMIT_BYTES)
        if responses := getattr(state, "openai_serving_responses", None):
            generate.refuse_before_streaming(responses, engine_client.vllm_config)
        if messages := getattr(state, "anthropic_serving_messages", None):
            generate.carry_through_messages(messages)
