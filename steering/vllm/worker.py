"""vLLM's worker for this platform, with steering installed once the model is loaded."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.distributed.parallel_state import get_tp_group
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.triton_utils import HAS_TRITON

from sae.card import HEADS, HookPoint
from sae.errors import SAEError
from sae.pass_order import place_in_pass
from sae.sae import SAE, open_sae
from steering.config import REFUSAL_VARIABLE, RESIDENT_NONE, SteeringConfig
from steering.request.special_tokens import special_token_ids
from steering.vllm import hook_points, runner_v1, runner_v2
from steering.vllm.finite_logits import keep_logits_finite
from steering.vllm.hook_points import Store
from steering.vllm.kv_transfer import refuse_unsalted_connectors
from steering.vllm.output_head import OutputHead
from steering.vllm.pass_guard import PassGuard
from steering.vllm.piecewise import split_at_steer
from steering.vllm.rehearsal import rehearse_full_passes
from steering.vllm.shared_heads import RankHeads
from steering.vllm.support import (
    UnsupportedEngineError,
    refuse_unknown_runner,
    refuse_unsupported,
)
from steering.vllm.unsupported import UnsupportedModelError
from steering.worker.ops import registered
from steering.worker.ops.buffers import Kernel
from steering.worker.ops.layout import FLOAT16_LIMIT
from steering.worker.scored_texts import ScoredTexts
from steering.worker.scores import Scores
from steering.worker.step import Step
from steering.worker.worker_sites import WorkerSites
from steering.worker.worker_state import SteeringState

if TYPE_CHECKING or current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
elif current_platform.is_cuda():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    raise UnsupportedEngineError(
        f"SAE steering runs on CUDA and on CPU, not on {current_platform.device_name}"
    )

logger = logging.getLogger("vllm.sae.steering")


class SteeringWorker(PlatformWorker):
    """A worker that steers; vLLM makes it if it is named as ``worker_cls``."""

    steering: SteeringState | None = None
    _guard: PassGuard | None = None
    _scored: ScoredTexts | None = None

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, then put the op at every hook point that this worker holds.

        Raises:
            UnsupportedEngineError: if an engine setting would make edits wrong or lose them.
            UnsupportedModelError: if the model's structure is not understood.
            SAEError: if an SAE cannot be used with the model as it is loaded.
        """
        config = SteeringConfig.from_additional_config(self.vllm_config.additional_config)
        if config is None or not config.saes:
            super().load_model(**kwargs)
            return
        with _last_word():
            refuse_unsupported(self.vllm_config)
            refuse_unsalted_connectors(self.vllm_config.kv_transfer_config)
            split_at_steer(self.vllm_config.compilation_config)
            super().load_model(**kwargs)
            self.steering = self._install(config)

    def determine_available_memory(self) -> int:
        """Profile the largest pass, in which every installed op must be called.

        Raises:
            UnsupportedModelError: if an op was not called.
        """
        with _last_word():
            found: int = super().determine_available_memory()
            if self._guard is not None:
                self._guard.check()
        return found

    def compile_or_warm_up_model(self) -> Any:
        """Compile and capture; from then on passes are not watched.

        Raises:
            UnsupportedModelError: if an installed op was not called in every pass so far.
        """
        with _last_word():
            times = super().compile_or_warm_up_model()
            if self._guard is not None:
                if self._guard.passes == 0:
                    self.model_runner._dummy_run(1)
                self._guard.check()
                self._guard.leave()
                self._guard = None
        return times

    def steering_take_results(
        self, key: str, limits: dict[int, int]
    ) -> list[dict[str, Any]] | None:
        """RPC: `SteeringState.take_results`; None from workers that keep no records."""
        if self.steering is None or not self._keeps_records:
            return None
        return self.steering.take_results(key, limits)

    def steering_take_stats(self) -> dict[str, float] | None:
        """RPC: `SteeringState.take_stats`; None from all but one worker of each stage."""
        if self.steering is None or not self._keeps_records:
            return None
        return self.steering.take_stats()

    def steering_compare_features(
        self,
        unsteered: str,
        steered: str,
        saes: list[int],
        start: int,
        stop: int,
        then_forget: list[str],
    ) -> list[dict[str, Any] | None] | None:
        """RPC: how features changed, by `StudyProbes.compare`; None from workers without records.

        This and the two calls below then forget what is kept under the keys ``then_forget``.
        """
        with self._forgetting(then_forget):
            if self.steering is None or not self._keeps_records:
                return None
            return self.steering.probes.compare(unsteered, steered, saes, start, stop)

    def steering_compare(
        self,
        unsteered: str,
        steered: list[tuple[str, list[int]]],
        targets: list[int],
        start: int,
        stop: int,
        then_forget: list[str],
    ) -> list[dict[str, bytes] | None] | None:
        """RPC: steered texts compared with an unsteered one, by `ScoredTexts.compare`."""
        with self._forgetting(then_forget):
            if self._scored is None:
                return None
            return self._scored.compare(unsteered, steered, targets, start, stop)

    def steering_log_probabilities(
        self, texts: list[tuple[str, int, list[int]]], then_forget: list[str]
    ) -> list[bytes | None] | None:
        """RPC: log p of the tokens of texts, by `ScoredTexts.log_probabilities`."""
        with self._forgetting(then_forget):
            return None if self._scored is None else self._scored.log_probabilities(texts)

    def steering_forget(self, keys: list[str]) -> None:
        """RPC: forget what is kept for studies under these keys."""
        if self.steering is not None:
            self.steering.forget(keys)

    @contextmanager
    def _forgetting(self, keys: list[str]) -> Iterator[None]:
        try:
            yield
        finally:
            self.steering_forget(keys)

    @property
    def _keeps_records(self) -> bool:
        """Whether this worker keeps records: all tensor-parallel ranks see the same stream."""
        return bool(get_tp_group().is_first_rank)

    def _special_token_ids(self, config: SteeringConfig) -> tuple[int, ...]:
        if config.special_token_ids is not None:
            return config.special_token_ids
        model = self.vllm_config.model_config
        return special_token_ids(cached_tokenizer_from_config(model), model.hf_config)

    def _scores(self, model: nn.Module, device: torch.device) -> Scores:
        vocab_size = self.vllm_config.model_config.get_vocab_size()
        return Scores(OutputHead(model), vocab_size, device, reports=self._keeps_records)

    @property
    def _heads(self) -> RankHeads | None:
        group = get_tp_group()
        if group.world_size == 1:
            return None
        return RankHeads(group.world_size, group.rank_in_group)

    def _refuse_other_heads(
        self, saes: Sequence[SAE], owned: Sequence[HookPoint], num_layers: int
    ) -> None:
        """Refuse SAEs of attention's heads with another width, which only a loaded model tells.

        Raises:
            SAEError: naming the SAE and both widths.
        """
        model, ranks = self.model_runner.get_model(), self.parallel_config.tensor_parallel_size
        for point in owned:
            if point.kind != HEADS:
                continue
            width = hook_points.width_of_heads(model, point, num_layers, ranks)
            for sae in saes:
                card = sae.card
                sides = [("d_in", card.d_in)] if card.reads == str(point) else []
                sides += [("d_out", card.d_out)] if str(point) in card.writes else []
                for name, found in sides:
                    if found != width:
                        raise SAEError(
                            f"SAE {card.id!r}: {name} is {found}, but the heads at {point} have "
                            f"{width} elements together"
                        )

    def _install(self, config: SteeringConfig) -> SteeringState:
        runner = self.model_runner
        model = runner.get_model()
        saes = [open_sae(ref) for ref in config.saes]
        places = {hook for sae in saes for hook in (sae.card.reads, *sae.card.writes)}
        points = [HookPoint.parse(hook) for hook in sorted(places, key=place_in_pass)]
        owned = hook_points.owned_hook_points(model, points, config.num_layers)
        _refuse_across_stages(saes, owned)
        self._refuse_other_heads(saes, owned, config.num_layers)
        adapter = runner_v2 if self.use_v2_model_runner else runner_v1
        refuse_unknown_runner(runner, adapter.RUNNER)
        positions, input_ids = adapter.token_buffers(runner)
        dtype = self.vllm_config.model_config.dtype
        sites = WorkerSites(
            saes,
            owned,
            num_slots=self.vllm_config.scheduler_config.max_num_seqs,
            max_rows=config.row_capacity,
            d_in=config.d_model,
            step=Step(positions.shape[0], positions, input_ids, runner.device),
            special_token_ids=self._special_token_ids(config),
            vocab_size=self.vllm_config.model_config.get_vocab_size(),
            device=runner.device,
            kernel=_kernel(runner.device, dtype),
            graphs=runner.device.type == "cuda"
            and self.vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE,
            resident=config.resident if runner.device.type == "cuda" else None,
            limit=FLOAT16_LIMIT if dtype == torch.float16 else math.inf,
            input_norms={
                str(point): hook_points.input_norm(model, point, config.num_layers)
                for point in owned
            },
            heads=self._heads,
        )
        state = SteeringState(sites, record=self._keeps_records)
        ranks = self.parallel_config.tensor_parallel_size
        stores = {
            point: hook_points.install(model, point, config.num_layers, ranks, dtype)
            for point in hook_points.install_order(owned)
        }
        hidden_dtypes = {dtype}
        if self.vllm_config.compilation_config.mode != CompilationMode.NONE:
            _tell_of_rounding(stores, dtype)
            if Store.WIDE in stores.values():
                hidden_dtypes.add(torch.float32)
        state.compile_kernel(dtype, hidden_dtypes)
        registered.make_current(state)
        adapter.attach(runner, state)
        keep_logits_finite(model, state)
        self._scored = ScoredTexts(state.captures, self._scores(model, runner.device))
        if runner.device.type == "cuda" and config.resident != RESIDENT_NONE:
            rehearse_full_passes(runner, state)
        self._guard = PassGuard(state, model, replayed=state.graphs)
        return state


def _refuse_across_stages(saes: Sequence[SAE], owned: Sequence[HookPoint]) -> None:
    """Refuse SAEs that read on one pipeline stage and write on another, which does not know f.

    Raises:
        SAEError: naming the SAE and its hook points.
    """
    on_this_stage = {str(point) for point in owned}
    for sae in saes:
        places = {sae.card.reads, *sae.card.writes}
        if places & on_this_stage and not places <= on_this_stage:
            raise SAEError(
                f"SAE {sae.card.id!r} reads at {sae.card.reads} and writes at "
                f"{', '.join(sae.card.writes)}, which are on different pipeline stages; serve it "
                "without --pipeline-parallel-size"
            )


def _tell_of_rounding(stores: Mapping[HookPoint, Store], dtype: torch.dtype) -> None:
    """Warn of hook points at which a compiled graph cannot be kept from rounding the stream."""
    rounded = ", ".join(str(point) for point, store in stores.items() if store is Store.ROUNDED)
    name = str(dtype).removeprefix("torch.")
    if rounded and dtype != torch.float32:
        logger.warning(
            "compiled in %s, the stream is rounded at %s, which it would not be without SAEs. "
            "Unsteered answers therefore differ from those of a server without SAEs, about as much "
            "as %s differs from float32 (a tenth of greedy tokens was seen to change). They do not "
            "depend on which other requests steer. With --enforce-eager or --dtype float32 there "
            "is no difference.",
            *(name, rounded, name),
        )


@contextmanager
def _last_word() -> Iterator[None]:
    """Tell the command that started the engine why it failed; vLLM only says that it did."""
    try:
        yield
    except (UnsupportedEngineError, UnsupportedModelError, SAEError) as error:
        file = os.environ.get(REFUSAL_VARIABLE)
        if file is not None:
            Path(file).write_text(str(error), encoding="utf-8")
        raise


def _kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Triton's kernel on CUDA and in Triton's interpreter, else the CPU's if it takes the dtype."""
    if device.type == "cuda" or (HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"):
        from steering.worker.ops import triton_kernel

        return triton_kernel
    from steering.worker.ops import cpu_kernel

    return cpu_kernel if cpu_kernel.edits(dtype) else None
