"""Every place inside vLLM that ``steering`` relies on, and a check that the installed one has them.

``server/seams.py`` has those of the server. This file is long because it is a list of data: each
module of this project has its own entries, though another may rely on the same place.

The check shows that names, parameters and fields exist, and that what is wrapped is still called.
That they still mean the same is shown by the engine tests.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from steering.vllm.source import Seam, Source
from steering.vllm.support import UnsupportedEngineError

#: The versions of vLLM that both lists were made from.
KNOWN_VERSIONS: Final = "0.32 and 0.33"
#: How many missing seams one message names; a much older or newer vLLM would lack dozens.
MAX_NAMED: Final = 4

#: The seams, by the module of this project that relies on them.
SEAMS: Final[dict[str, tuple[Seam, ...]]] = {
    "steering/vllm/plugin.py": (
        Seam("v1.engine.input_processor", "InputProcessor", fields=("vllm_config",)),
        Seam("v1.engine.input_processor", "InputProcessor.process_inputs", mentions=("clone",)),
        Seam("v1.engine.async_llm", "AsyncLLM", mentions=("process_inputs",)),
        Seam("v1.engine.llm_engine", "LLMEngine", mentions=("process_inputs",)),
        Seam(
            "v1.engine.async_llm",
            "AsyncLLM.generate",
            first=("prompt", "sampling_params", "request_id"),
        ),
        Seam("entrypoints.common.offline", "OfflineInferenceMixin", fields=("llm_engine",)),
        Seam(
            "entrypoints.common.offline",
            "OfflineInferenceMixin._render_and_add_requests",
            first=("prompts", "params"),
        ),
        Seam("plugins", "", mentions=("vllm.general_plugins",)),
    ),
    "steering/vllm/door.py": (
        Seam(
            "config.vllm",
            "VllmConfig",
            fields=(
                *("additional_config", "model_config", "parallel_config"),
                "speculative_config",
            ),
        ),
        Seam("config.model", "ModelConfig", fields=("max_model_len",)),
        Seam("config.parallel", "ParallelConfig", fields=("pipeline_parallel_size",)),
        Seam(
            "distributed.utils",
            "get_pp_indices",
            first=("num_hidden_layers", "pp_rank", "pp_size"),
        ),
        Seam("platforms", "current_platform"),
        Seam("platforms.interface", "Platform", fields=("is_cuda",)),
        Seam(
            "v1.engine",
            "EngineCoreRequest",
            fields=(
                *("sampling_params", "prompt_token_ids", "prompt_embeds", "request_id"),
                *("cache_salt", "resumable"),
            ),
        ),
        Seam(
            "sampling_params",
            "SamplingParams",
            fields=("extra_args", "n", "max_tokens", "stop", "skip_reading_prefix_cache"),
        ),
        Seam("sampling_params", "SamplingParams.clone", mentions=("deepcopy",)),
        Seam("v1.engine.exceptions", "EngineGenerateError"),
        Seam("inputs.engine", "TokensInput", fields=("prompt_token_ids",)),
        Seam("v1.core.kv_cache_utils", "", mentions=("cache_salt",)),
        Seam("v1.request", "Request", mentions=("skip_reading_prefix_cache",)),
        Seam("v1.core.sched.scheduler", "Scheduler", mentions=("skip_reading_prefix_cache",)),
        Seam("v1.engine.parallel_sampling", "ParentRequest.get_child_info", first=("index",)),
    ),
    "steering/vllm/results.py": (
        Seam("exceptions", "RetryableRequestError"),
        Seam("sampling_params", "RequestOutputKind", fields=("DELTA",)),
        Seam("sampling_params", "SamplingParams", fields=("extra_args", "output_kind")),
        Seam(
            "v1.engine.async_llm",
            "AsyncLLM",
            fields=("engine_core", "get_tokenizer"),
        ),
        Seam("v1.engine.async_llm", "AsyncLLM", fields=("errored", "dead_error")),
        Seam("v1.engine.core_client", "AsyncMPClient", fields=("core_engines",)),
        Seam(
            "v1.engine.core_client",
            "DPLBAsyncMPClient.get_core_engine_for_request",
            first=("request",),
        ),
        Seam("v1.engine.core_client", "DPLBAsyncMPClient.call_utility_all_async"),
        Seam("v1.engine.core_client", "AsyncMPClient.call_utility_all_async", first=("method",)),
        Seam(
            "v1.engine.core_client",
            "AsyncMPClient._call_utility_async",
            first=("method",),
            parameters=("engine",),
        ),
        Seam(
            "v1.engine.core",
            "EngineCore.collective_rpc",
            first=("method", "timeout", "args", "kwargs"),
        ),
        Seam("entrypoints.llm", "LLM", fields=("llm_engine", "get_tokenizer")),
        Seam("v1.engine.llm_engine", "LLMEngine", fields=("input_processor",)),
        Seam("entrypoints.llm", "LLM.collective_rpc", first=("method",), parameters=("args",)),
        Seam(
            "outputs",
            "RequestOutput",
            fields=("request_id", "prompt_token_ids", "outputs", "num_cached_tokens"),
        ),
        Seam(
            "outputs",
            "CompletionOutput",
            fields=("index", "token_ids", "finish_reason", "stop_reason"),
        ),
    ),
    "steering/vllm/offline.py": (
        Seam("", "LLM"),
        Seam("", "EngineArgs"),
        Seam("", "SamplingParams"),
        Seam("engine.arg_utils", "EngineArgs.create_model_config"),
        Seam("entrypoints.llm", "LLM.generate", first=("prompts", "sampling_params")),
        Seam("entrypoints.llm", "LLM.chat", first=("messages", "sampling_params")),
        Seam("entrypoints.llm", "LLM.get_default_sampling_params"),
    ),
    "steering/vllm/reader.py": (
        Seam(
            "v1.engine.async_llm",
            "AsyncLLM.generate",
            parameters=("lora_request", "priority", "data_parallel_rank"),
        ),
        Seam(
            "v1.engine.core_client",
            "DPLBAsyncMPClient.get_core_engine_for_request",
            mentions=("data_parallel_rank", "core_engines"),
        ),
        Seam("v1.engine.async_llm", "AsyncLLM", fields=("engine_core", "vllm_config")),
        Seam("v1.engine.core_client", "AsyncMPClient", fields=("core_engines",)),
        Seam("config.vllm", "VllmConfig", fields=("kv_transfer_config",)),
        Seam("entrypoints.llm", "LLM", fields=("llm_engine",)),
        Seam("entrypoints.llm", "LLM.collective_rpc", first=("method",), parameters=("args",)),
        Seam("exceptions", "RetryableRequestError"),
        Seam("", "LLM"),
        Seam("", "SamplingParams"),
        Seam(
            "sampling_params",
            "SamplingParams",
            fields=(
                *("max_tokens", "temperature", "detokenize", "skip_reading_prefix_cache"),
                "extra_args",
            ),
        ),
        Seam("inputs", "TokensPrompt", fields=("prompt_token_ids", "cache_salt")),
        Seam("inputs.engine", "TokensInput", fields=("type", "prompt_token_ids")),
        Seam(
            "entrypoints.llm",
            "LLM.generate",
            first=("prompts", "sampling_params"),
            parameters=("use_tqdm", "lora_request"),
        ),
    ),
    "steering/vllm/giving_way.py": (
        Seam(
            "v1.engine.async_llm",
            "AsyncLLM",
            fields=(
                *("vllm_config", "errored", "get_num_unfinished_requests"),
                "get_num_queued_tokens",
            ),
        ),
        Seam(
            "config.scheduler",
            "SchedulerConfig",
            fields=("max_num_batched_tokens", "max_num_queued_reqs", "max_num_queued_tokens"),
        ),
        Seam("config.device", "DeviceConfig", fields=("device_type",)),
        Seam("v1.engine.core_client", "AsyncMPClient", fields=("core_engines",)),
        Seam("outputs", "RequestOutput", fields=("metrics", "finished")),
        Seam("v1.metrics.stats", "RequestStateStats", fields=("queued_ts", "scheduled_ts")),
    ),
    "steering/vllm/vocabulary.py": (
        Seam("exceptions", "VLLMClientError"),
        Seam("entrypoints.llm", "LLM", fields=("renderer",)),
        Seam(
            "entrypoints.common.offline",
            "OfflineInferenceMixin._preprocess_chat",
            first=("conversations",),
            parameters=("add_generation_prompt",),
        ),
        Seam("renderers.base", "BaseRenderer", fields=("model_config", "default_cmpl_tok_params")),
        *(
            Seam("renderers.base", f"BaseRenderer.{method}", first=first)
            for method, first in (
                ("tokenize_prompt", ("prompt", "params")),
                ("tokenize_prompt_async", ("prompt", "params")),
                ("validate_token_ids", ("token_ids",)),
                ("get_tokenizer", ()),
            )
        ),
        Seam("renderers.params", "TokenizeParams.with_kwargs"),
        Seam("renderers.params", "TokenizeParams", fields=("add_special_tokens",)),
        Seam("inputs.engine", "TokensInput", fields=("type", "prompt_token_ids")),
    ),
    "steering/vllm/engine_arguments.py": (
        Seam(
            "config.model",
            "ModelConfig",
            fields=("get_hidden_size", "get_total_num_hidden_layers"),
        ),
    ),
    "steering/vllm/drain.py": (
        Seam(
            "v1.engine.core",
            "EngineCore",
            fields=("scheduler", "vllm_config", "batch_queue", "model_executor"),
        ),
        Seam(
            "v1.engine.core",
            "EngineCoreProc._invoke_utility_method",
            mentions=("Future", "add_done_callback"),
        ),
        Seam(
            "v1.executor.multiproc_executor",
            "MultiprocExecutor.collective_rpc",
            parameters=("args", "non_block"),
        ),
        Seam("v1.executor.multiproc_executor", "FutureWrapper.result", mentions=("futures_queue",)),
        Seam("v1.engine.core", "EngineCoreProc.has_work", first=()),
        Seam("v1.engine.core", "EngineCoreProc._handle_shutdown", mentions=("has_work",)),
        Seam("v1.engine.core", "EngineCoreProc.is_running", first=()),
        Seam(
            "v1.engine.core",
            "EngineCoreProc._reject_utility_in_shutdown",
            first=("client_idx", "call_id", "method_name"),
        ),
        Seam(
            "v1.engine.core",
            "EngineCoreProc._handle_client_request",
            mentions=("_reject_utility_in_shutdown", "method_name"),
        ),
        Seam("config.vllm", "VllmConfig", fields=("shutdown_timeout",)),
    ),
    "steering/vllm/tracing.py": (
        Seam("v1.engine.output_processor", "OutputProcessor", fields=("request_states",)),
        Seam("v1.engine.output_processor", "OutputProcessor.add_request", first=("request",)),
        Seam(
            "v1.engine.output_processor",
            "OutputProcessor.do_tracing",
            first=("engine_core_output", "req_state"),
        ),
        Seam(
            "v1.engine.output_processor",
            "OutputProcessor.process_outputs",
            mentions=("do_tracing",),
        ),
        Seam("config.vllm", "VllmConfig", fields=("observability_config",)),
        Seam("config.observability", "ObservabilityConfig", fields=("otlp_traces_endpoint",)),
    ),
    "steering/vllm/scheduler.py": (
        Seam("v1.core.sched.async_scheduler", "AsyncScheduler", fields=("add_request",)),
        Seam(
            "v1.core.sched.scheduler",
            "Scheduler",
            fields=("requests",),
            mentions=("_free_request", "get_request_counts", "_reserve_prefill_lookahead"),
        ),
        Seam("v1.core.sched.scheduler", "Scheduler.__init__", first=("vllm_config",)),
        Seam("v1.core.sched.scheduler", "Scheduler.add_request", first=("request",)),
        Seam(
            "v1.core.sched.scheduler",
            "Scheduler.finish_requests",
            first=("request_ids", "finished_status"),
        ),
        Seam("v1.core.sched.scheduler", "Scheduler.get_request_counts"),
        Seam("v1.core.sched.scheduler", "Scheduler._free_request", first=("request",)),
        Seam(
            "v1.core.sched.scheduler",
            "Scheduler._reserve_prefill_lookahead",
            first=("request", "num_computed_tokens", "num_new_tokens"),
        ),
        Seam(
            "v1.request",
            "Request",
            fields=(
                *("request_id", "sampling_params", "status", "stop_reason", "num_tokens"),
                *("num_output_placeholders", "num_prompt_tokens"),
            ),
        ),
        Seam(
            "v1.core.sched.scheduler",
            "Scheduler.update_from_output",
            first=("scheduler_output", "model_runner_output"),
            mentions=("_update_request_with_output", "should_emit_output", "stop_reason"),
        ),
        Seam(
            "v1.core.sched.scheduler",
            "Scheduler._update_request_with_output",
            first=("request", "new_token_ids"),
            parameters=("is_stale",),
        ),
        Seam(
            "v1.core.sched.async_scheduler",
            "AsyncScheduler._update_request_with_output",
            first=("request", "new_token_ids"),
            parameters=("is_stale",),
            mentions=("num_output_placeholders",),
        ),
        Seam("v1.request", "Request.__lt__", mentions=("priority", "arrival_time")),
        Seam("v1.request", "RequestStatus"),
        Seam("v1.engine.core", "EngineCore", mentions=("get_scheduler_cls", "finish_requests")),
        Seam(
            "config.vllm",
            "VllmConfig",
            fields=("additional_config", "scheduler_config", "kv_transfer_config"),
        ),
        Seam(
            "config.scheduler",
            "SchedulerConfig",
            fields=("scheduler_cls", "async_scheduling", "policy"),
        ),
    ),
    "steering/vllm/kv_transfer.py": (
        Seam(
            "config.kv_transfer",
            "KVTransferConfig",
            fields=("kv_connector", "kv_connector_module_path", "kv_connector_extra_config"),
        ),
        *(
            Seam("distributed.kv_transfer.kv_connector.factory", "", mentions=(name,))
            for name in (
                *("OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector"),
                *("LMCacheMPConnector", "NixlConnector", "MooncakeConnector", "MultiConnector"),
            )
        ),
        Seam(
            "distributed.kv_transfer.kv_connector.v1.multi_connector",
            "",
            mentions=("connectors", "kv_connector_extra_config"),
        ),
        Seam(
            "distributed.kv_transfer.kv_connector.v1.base",
            "KVConnectorBase_V1.get_num_new_matched_tokens",
            first=("request", "num_computed_tokens"),
        ),
        *(
            Seam(f"distributed.kv_transfer.kv_connector.v1.{module}", "", mentions=(word,))
            for module, word in (
                ("offloading.scheduler", "block_hashes"),
                ("mooncake.store.scheduler", "block_hashes"),
                ("lmcache_mp_connector", "cache_salt"),
                ("nixl.pull_scheduler", "do_remote_prefill"),
                ("nixl.pull_scheduler", "remote_block_ids"),
                ("nixl.push_scheduler", "do_remote_prefill"),
                ("mooncake.mooncake_connector", "do_remote_prefill"),
            )
        ),
        Seam("v1.simple_kv_offload.manager", "", mentions=("block_hashes",)),
        Seam("v1.core.sched.scheduler", "Scheduler", fields=("connector",)),
        Seam("v1.core.sched.scheduler", "Scheduler", mentions=("get_num_new_matched_tokens",)),
        Seam("v1.request", "Request", fields=("kv_transfer_params", "cache_salt")),
    ),
    "steering/vllm/piecewise.py": (
        Seam("compilation.breakable_cudagraph", "is_breakable_cudagraph_enabled"),
        Seam("config.compilation", "CompilationMode", fields=("VLLM_COMPILE",)),
        Seam("config.compilation", "CUDAGraphMode", fields=("PIECEWISE",)),
        Seam("config.compilation", "CUDAGraphMode.has_piecewise_cudagraphs"),
        Seam("config.compilation", "CUDAGraphMode.mixed_mode"),
        Seam(
            "config.compilation",
            "CompilationConfig",
            fields=(
                *("mode", "cudagraph_mode", "use_inductor_graph_partition", "splitting_ops"),
                "splitting_ops_contain_attention",
            ),
        ),
        Seam("compilation.backends", "", mentions=("splitting_ops", "split_graph")),
        Seam(
            "v1.worker.gpu.cudagraph_utils",
            "CudaGraphManager",
            fields=("cudagraph_mode", "compilation_config"),
        ),
    ),
    "steering/vllm/finite_logits.py": (
        Seam("v1.worker.gpu_model_runner", "GPUModelRunner", mentions=("compute_logits",)),
        Seam("v1.worker.gpu.model_runner", "GPUModelRunner", mentions=("compute_logits",)),
        Seam("v1.worker.gpu.model_runner", "", mentions=("compute_logits_local",)),
    ),
    "steering/vllm/output_head.py": (
        Seam("model_executor.models.interfaces_base", "VllmModelForTextGeneration.compute_logits"),
        Seam(
            "lora.layers.logits_processor",
            "LogitsProcessorWithLoRA",
            mentions=("punica_wrapper", "add_lora_logits"),
        ),
    ),
    "steering/vllm/pass_positions.py": (
        Seam(
            "v1.core.sched.output",
            "SchedulerOutput",
            fields=("scheduled_cached_reqs", "scheduled_new_reqs"),
        ),
        Seam(
            "v1.core.sched.output", "CachedRequestData", fields=("req_ids", "num_computed_tokens")
        ),
        Seam("v1.core.sched.output", "NewRequestData", fields=("req_id", "num_computed_tokens")),
    ),
    "steering/vllm/rehearsal.py": (
        Seam("v1.worker.gpu_model_runner", "GPUModelRunner.profile_run"),
        Seam("v1.worker.gpu.model_runner", "GPUModelRunner.profile_run"),
        Seam(
            "v1.worker.gpu_worker", "Worker.determine_available_memory", mentions=("profile_run",)
        ),
    ),
    "steering/vllm/worker.py": (
        Seam("tokenizers", "cached_tokenizer_from_config"),
        Seam("config.compilation", "CUDAGraphMode", fields=("NONE",)),
        Seam("config.compilation", "CompilationMode", fields=("NONE",)),
        Seam("distributed.parallel_state", "get_tp_group"),
        Seam(
            "distributed.parallel_state",
            "GroupCoordinator",
            fields=("is_first_rank", "world_size", "rank_in_group"),
        ),
        Seam("platforms", "current_platform"),
        Seam("platforms.interface", "Platform", fields=("is_cpu", "is_cuda", "device_name")),
        Seam("triton_utils", "HAS_TRITON"),
        *(
            Seam(f"v1.worker.{module}", f"{worker}.{method}")
            for module, worker in (("cpu_worker", "CPUWorker"), ("gpu_worker", "Worker"))
            for method in ("load_model", "determine_available_memory", "compile_or_warm_up_model")
        ),
        Seam("v1.worker.gpu_model_runner", "GPUModelRunner._dummy_run", first=("num_tokens",)),
        Seam("v1.worker.gpu.model_runner", "GPUModelRunner._dummy_run", first=("num_tokens",)),
        Seam(
            "v1.worker.gpu_worker",
            "Worker",
            fields=("model_runner", "use_v2_model_runner", "vllm_config", "parallel_config"),
        ),
        Seam("v1.worker.cpu_worker", "CPUWorker", fields=("model_runner",)),
        Seam("v1.worker.worker_base", "", mentions=("worker_cls",)),
        Seam(
            "config.vllm",
            "VllmConfig",
            fields=(
                *("additional_config", "model_config", "scheduler_config"),
                *("compilation_config", "kv_transfer_config"),
            ),
        ),
        Seam("config.scheduler", "SchedulerConfig", fields=("max_num_seqs",)),
        Seam("config.parallel", "ParallelConfig", fields=("tensor_parallel_size", "worker_cls")),
        Seam("config.compilation", "CompilationConfig", fields=("cudagraph_mode", "mode")),
        Seam("config.model", "ModelConfig", fields=("get_vocab_size",)),
    ),
    "steering/vllm/support.py": (
        Seam(
            "config.vllm",
            "VllmConfig",
            fields=("model_config", "parallel_config", "cache_config", "speculative_config"),
        ),
        Seam(
            "config.parallel",
            "ParallelConfig",
            fields=(
                *("enable_hc_sp", "tensor_parallel_size"),
                *("prefill_context_parallel_size", "use_ubatching", "use_sequence_parallel_moe"),
            ),
        ),
        Seam("config.cache", "CacheConfig", fields=("kv_sharing_fast_prefill",)),
        Seam("config.speculative", "SpeculativeConfig", fields=("enable_adaptive_verification",)),
        Seam("config.model", "ModelConfig", fields=("is_encoder_decoder", "runner_type")),
        Seam("envs", "VLLM_FLOAT32_MATMUL_PRECISION"),
        Seam(
            "model_executor.models.deepseek_v2",
            "DeepseekV2DecoderLayer.forward",
            mentions=("routed_scaling_factor", "float16"),
        ),
    ),
    "steering/vllm/hook_points.py": (
        Seam(
            "model_executor.layers.linear",
            "RowParallelLinear",
            fields=("reduce_results", "input_size"),
        ),
        Seam("model_executor.layers.layernorm", "RMSNorm", fields=("variance_epsilon",)),
        Seam("model_executor.layers.layernorm", "RMSNorm", fields=("variance_size_override",)),
        Seam("model_executor.layers.layernorm", "GemmaRMSNorm", fields=("variance_epsilon",)),
    ),
    "steering/vllm/head_outputs.py": (
        Seam(
            "model_executor.layers.attention.attention",
            "Attention",
            fields=("num_heads", "head_size"),
        ),
        Seam("model_executor.layers.linear", "RowParallelLinear", fields=("input_size",)),
    ),
    "steering/vllm/shared_heads.py": (
        Seam(
            "distributed.communication_op",
            "tensor_model_parallel_all_gather",
            first=("input_", "dim"),
        ),
    ),
    "steering/vllm/decoder_layers.py": (
        Seam("model_executor.models.utils", "PPMissingLayer"),
        Seam("model_executor.models.interfaces", "SupportsMultiModal.get_language_model"),
    ),
    "steering/vllm/layer_source.py": (
        Seam("model_executor.layers.layernorm", "RMSNorm.forward_native", first=("x", "residual")),
        Seam("model_executor.layers.layernorm", "GemmaRMSNorm"),
    ),
    "steering/vllm/installation.py": (
        Seam(
            "model_executor.models.transformers.fusers.base",
            "RewriteFuser.fuse",
            first=("module",),
            mentions=("MethodType", "forward"),
        ),
    ),
    "steering/vllm/pass_outputs.py": (
        Seam("v1.outputs", "AsyncModelRunnerOutput.get_output", first=()),
        Seam("v1.outputs", "ModelRunnerOutput", fields=("req_ids",)),
        Seam("v1.worker.gpu_model_runner", "GPUModelRunner.sample_tokens"),
        Seam("v1.worker.gpu.model_runner", "GPUModelRunner.sample_tokens"),
        Seam("v1.worker.gpu_worker", "Worker.sample_tokens", mentions=("sample_tokens",)),
        Seam("v1.executor.uniproc_executor", "", mentions=("AsyncModelRunnerOutput",)),
        Seam("v1.executor.multiproc_executor", "", mentions=("AsyncModelRunnerOutput",)),
    ),
    "steering/vllm/streamed_reads.py": (
        Seam("v1.engine", "EngineCoreOutput", fields=("request_id", "kv_transfer_params")),
        Seam("v1.engine", "EngineCoreOutputs", fields=("outputs",)),
        Seam(
            "v1.engine.output_processor",
            "OutputProcessor.process_outputs",
            first=("engine_core_outputs",),
        ),
        Seam("v1.engine.async_llm", "AsyncLLM", mentions=("process_outputs",)),
    ),
    "steering/vllm/runner_v1.py": (
        Seam(
            "v1.worker.gpu_model_runner",
            "GPUModelRunner",
            fields=(
                *("positions", "input_ids", "query_start_loc", "input_batch", "device"),
                "get_model",
            ),
        ),
        Seam("v1.worker.cpu_model_runner", "CPUModelRunner", fields=("_model_forward",)),
        Seam(
            "v1.worker.gpu_model_runner",
            "GPUModelRunner._update_states",
            first=("scheduler_output",),
        ),
        Seam("v1.worker.gpu_model_runner", "GPUModelRunner._model_forward"),
        Seam(
            "v1.worker.gpu_model_runner",
            "GPUModelRunner._determine_batch_execution_and_padding",
            parameters=("force_eager",),
        ),
        Seam(
            "v1.worker.gpu_model_runner",
            "GPUModelRunner.execute_model",
            mentions=(
                *("_update_states", "_model_forward"),
                "_determine_batch_execution_and_padding",
            ),
        ),
        Seam("v1.utils", "CpuGpuBuffer", fields=("gpu", "np")),
        Seam("v1.worker.gpu_input_batch", "InputBatch", fields=("req_ids", "num_reqs")),
        Seam(
            "v1.core.sched.output",
            "SchedulerOutput",
            fields=(
                *("finished_req_ids", "preempted_req_ids", "scheduled_cached_reqs"),
                *("scheduled_new_reqs", "num_scheduled_tokens"),
            ),
        ),
        Seam("v1.core.sched.output", "CachedRequestData", fields=("resumed_req_ids",)),
        Seam("v1.core.sched.output", "NewRequestData", fields=("req_id", "sampling_params")),
    ),
    "steering/vllm/runner_v2.py": (
        Seam(
            "v1.worker.gpu.model_runner",
            "GPUModelRunner",
            fields=(
                *("input_buffers", "model_state", "get_model", "device"),
                "execute_model_state",
            ),
            mentions=("add_request", "preprocess_state"),
        ),
        Seam(
            "v1.worker.gpu.model_runner",
            "GPUModelRunner.execute_model",
            first=("scheduler_output",),
            mentions=("dispatch_cg_and_sync_dp", "preprocess_state"),
        ),
        Seam(
            "v1.core.sched.output",
            "SchedulerOutput",
            fields=("finished_req_ids", "preempted_req_ids", "num_scheduled_tokens"),
        ),
        Seam(
            "v1.worker.gpu.dp_utils",
            "dispatch_cg_and_sync_dp",
            first=("cudagraph_manager", "num_reqs", "num_tokens", "uniform_token_count"),
            parameters=("max_query_len", "need_eager"),
        ),
        Seam(
            "v1.worker.gpu.model_states.interface",
            "ModelState.add_request",
            first=("req_index", "new_req_data"),
        ),
        Seam(
            "v1.worker.gpu.model_states.interface",
            "ModelState.preprocess_state",
            first=("input_batch",),
        ),
        Seam("v1.worker.gpu.model_runner", "ExecuteModelState", fields=("hidden_states",)),
        Seam("v1.worker.gpu.input_batch", "InputBuffers", fields=("positions", "input_ids")),
        Seam(
            "v1.worker.gpu.input_batch",
            "InputBatch",
            fields=("req_ids", "num_reqs", "query_start_loc_np"),
        ),
    ),
    "steering/vllm/ignored.py": tuple(
        Seam(f"entrypoints.openai.{module}.protocol", f"{name}.to_sampling_params")
        for module, name in (
            ("chat_completion", "ChatCompletionRequest"),
            ("completion", "CompletionRequest"),
            ("responses", "ResponsesRequest"),
        )
    ),
    "steering/vllm/start_failure.py": (
        Seam("v1.engine.core", "", mentions=("EngineCore failed to start.",)),
        Seam("v1.executor.multiproc_executor", "", mentions=("WorkerProc failed to start.",)),
    ),
    "steering/unembedding.py": (
        Seam("config.model", "ModelConfig", fields=("model", "revision", "hf_text_config")),
    ),
}


@functools.cache
def refuse_missing_seams() -> None:
    """Check this list against the installed vLLM, once in a process; it takes half a second.

    Raises:
        UnsupportedEngineError: see `refuse_missing`.
    """
    refuse_missing(SEAMS)


def refuse_missing(seams: Mapping[str, Sequence[Seam]]) -> None:
    """Check a list of seams against the installed vLLM.

    Args:
        seams: by the module of this project that relies on them.

    Raises:
        UnsupportedEngineError: if vLLM is not installed, or lacks one of them. It is one line with
            vLLM's version and what is missing.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise UnsupportedEngineError("vLLM is not installed")
    source = Source(Path(found.origin).parent)
    lacking = source.lacking(seams)
    if lacking:
        more = f" and {len(lacking) - MAX_NAMED} more" if len(lacking) > MAX_NAMED else ""
        raise UnsupportedEngineError(
            f"vLLM {source.version} cannot be steered, vllm-sae knows {KNOWN_VERSIONS}: "
            f"{'; '.join(lacking[:MAX_NAMED])}{more}"
        )
