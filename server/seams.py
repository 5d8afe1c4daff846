"""Every place of vLLM's insides that ``server`` leans on; see `steering.vllm.seams`."""

from __future__ import annotations

from typing import Final

from steering.vllm.source import Seam

#: By the module of ours that leans on them.
SEAMS: Final[dict[str, tuple[Seam, ...]]] = {
    "server/allow_list.py": (
        Seam("plugins", "load_plugins_by_group", first=("group",)),
        Seam("plugins", "load_endpoint_plugins", mentions=("load_plugins_by_group",)),
        Seam("plugins", "", mentions=("vllm.endpoint_plugins", "vllm.general_plugins")),
        Seam("envs", "", mentions=("VLLM_PLUGINS",)),
    ),
    "server/plugin.py": (
        Seam(
            "plugins.endpoint_plugins.interface",
            "EndpointPlugin",
            fields=("name", "required_tasks"),
        ),
        Seam("plugins.endpoint_plugins.interface", "EndpointPlugin.attach_router", first=("app",)),
        Seam(
            "plugins.endpoint_plugins.interface",
            "EndpointPlugin.init_state",
            first=("engine_client", "state", "args"),
        ),
        Seam(
            "v1.engine.async_llm",
            "AsyncLLM",
            fields=("vllm_config", "renderer", "model_config"),
        ),
        Seam("renderers.base", "BaseRenderer", fields=("tokenizer",)),
    ),
    "server/presets/models.py": (
        Seam(
            "entrypoints.openai.models.serving",
            "OpenAIServingModels",
            fields=("base_model_paths", "lora_requests", "model_config"),
        ),
        Seam(
            "entrypoints.openai.models.serving",
            "OpenAIServingModels.is_base_model",
            first=("model_name",),
        ),
        Seam(
            "entrypoints.openai.models.serving",
            "OpenAIServingModels.model_name",
            first=("lora_request",),
        ),
        Seam("entrypoints.openai.models.serving", "OpenAIServingModels.show_available_models"),
        Seam("", "envs"),
        Seam("envs", "", mentions=("VLLM_SKIP_MODEL_NAME_VALIDATION",)),
        Seam(
            "entrypoints.serve.engine.protocol",
            "ModelCard",
            fields=("id", "created", "owned_by", "root", "parent", "max_model_len", "permission"),
        ),
        Seam("entrypoints.serve.engine.protocol", "ModelPermission"),
        *(
            Seam(f"entrypoints.openai.{api}.serving", "", mentions=("model_name", "_check_model"))
            for api in ("chat_completion", "completion", "responses")
        ),
    ),
    "server/protocol.py": (
        *(
            Seam(f"entrypoints.openai.{api}.protocol", f"{name}.to_sampling_params")
            for api, name in (
                ("chat_completion", "ChatCompletionRequest"),
                ("completion", "CompletionRequest"),
                ("responses", "ResponsesRequest"),
            )
        ),
        Seam(
            "entrypoints.openai.chat_completion.protocol",
            "ChatCompletionRequest",
            fields=("vllm_xargs", "use_beam_search", "messages", "field_names"),
        ),
        Seam(
            "entrypoints.openai.completion.protocol",
            "CompletionRequest",
            fields=("vllm_xargs", "use_beam_search", "prompt_embeds"),
        ),
        Seam(
            "entrypoints.openai.responses.protocol",
            "ResponsesRequest",
            fields=("vllm_xargs", "background"),
        ),
        Seam("entrypoints.anthropic.protocol", "AnthropicMessagesRequest"),
    ),
    "server/routes/generate.py": (
        *(
            Seam(module, name, first=("request", "raw_request"))
            for module, name in (
                ("entrypoints.openai.chat_completion.api_router", "create_chat_completion"),
                ("entrypoints.openai.completion.api_router", "create_completion"),
                ("entrypoints.openai.responses.api_router", "create_responses"),
                ("entrypoints.anthropic.api_router", "create_messages"),
            )
        ),
        Seam(
            "entrypoints.openai.responses.serving",
            "OpenAIServingResponses._generate_with_builtin_tools",
            parameters=("engine_input", "sampling_params"),
        ),
        Seam(
            "entrypoints.openai.responses.serving",
            "OpenAIServingResponses._create_responses",
            mentions=("_generate_with_builtin_tools",),
        ),
        Seam("entrypoints.openai.responses.api_router", "", mentions=("openai_serving_responses",)),
        Seam("entrypoints.anthropic.api_router", "", mentions=("anthropic_serving_messages",)),
        Seam(
            "entrypoints.anthropic.serving", "AnthropicServingMessages.to_chat_completion_request"
        ),
        Seam(
            "entrypoints.anthropic.serving",
            "AnthropicServingMessages.create_messages",
            mentions=("to_chat_completion_request",),
        ),
    ),
    "server/commands/serve.py": (
        Seam("entrypoints.cli.serve", "ServeSubcommand.cmd"),
        Seam("entrypoints.cli.serve", "ServeSubcommand.subparser_init", first=("subparsers",)),
        Seam("entrypoints.cli.serve", "ServeSubcommand.validate", first=("args",)),
    ),
    "server/commands/run_batch.py": (
        Seam("entrypoints.cli.run_batch", "RunBatchSubcommand"),
        Seam(
            "entrypoints.cli.run_batch", "RunBatchSubcommand.subparser_init", first=("subparsers",)
        ),
        Seam("entrypoints.launchers.run_batch", "", mentions=("ChatCompletionRequest",)),
        Seam("entrypoints.launchers.run_batch", "main", first=("args",), mentions=("run_batch",)),
        Seam("entrypoints.launchers.run_batch", "run_batch", first=("engine_client",)),
        Seam(
            "entrypoints.launchers.run_batch",
            "run_request",
            first=("serving_engine_func", "request"),
        ),
        Seam(
            "entrypoints.launchers.run_batch", "handle_endpoint_request", mentions=("run_request",)
        ),
        Seam("entrypoints.launchers.run_batch", "BatchRequestOutput", fields=("response", "error")),
    ),
    "server/routes/studies.py": (Seam("exceptions", "VLLMError"),),
    "server/study_stream.py": (
        Seam("exceptions", "VLLMError"),
        Seam(
            "entrypoints.serve.exception_handling.error_response",
            "create_error_response",
            first=("message",),
        ),
    ),
    "server/start/cpu_memory.py": (
        Seam("platforms", "current_platform"),
        Seam("platforms.interface", "Platform.is_cpu"),
        Seam("utils.cpu_resource_utils", "get_memory_node_info", first=("node_id",)),
        Seam("utils.cpu_resource_utils", "get_visible_memory_node"),
        Seam(
            "engine.arg_utils",
            "EngineArgs",
            fields=(
                *("gpu_memory_utilization", "kv_cache_memory_bytes", "tensor_parallel_size"),
                *("pipeline_parallel_size", "data_parallel_size"),
            ),
        ),
    ),
    "server/start/engine.py": (Seam("tokenizers", "cached_tokenizer_from_config"),),
    "server/start/arguments.py": (
        Seam(
            "entrypoints.common.startup",
            "cli_env_setup",
            or_in="entrypoints.serve.utils.api_utils",
        ),
        Seam("logger", "configure_logging_from_args", first=("args",)),
        Seam("utils.argparse_utils", "FlexibleArgumentParser"),
        Seam("", "AsyncEngineArgs"),
        Seam("", "envs"),
        Seam("envs", "VLLM_USE_RUST_FRONTEND"),
        Seam(
            "engine.arg_utils",
            "AsyncEngineArgs",
            fields=(
                *("worker_cls", "scheduler_cls", "additional_config", "skip_tokenizer_init"),
                *("runner", "from_cli_args"),
            ),
        ),
        Seam("engine.arg_utils", "EngineArgs.create_engine_config", parameters=("headless",)),
    ),
    "server/commands/inspect_sae.py": (
        Seam("", "LLM"),
        Seam("", "EngineArgs"),
        Seam("utils.argparse_utils", "FlexibleArgumentParser"),
        Seam("entrypoints.llm", "LLM.from_engine_args", first=("engine_args",)),
        Seam("engine.arg_utils", "EngineArgs.add_cli_args", first=("parser",)),
        Seam("engine.arg_utils", "EngineArgs.create_engine_config"),
        Seam(
            "engine.arg_utils",
            "EngineArgs",
            fields=(
                *("enforce_eager", "max_num_seqs", "kv_cache_memory_bytes", "disable_log_stats"),
                *("max_model_len", "from_cli_args"),
            ),
        ),
        Seam("v1.engine.llm_engine", "LLMEngine", fields=("engine_core",)),
        Seam("v1.engine.core_client", "EngineCoreClient.shutdown", parameters=("timeout",)),
    ),
    "server/commands/study.py": (
        Seam("", "LLM"),
        Seam("", "EngineArgs"),
        Seam("utils.argparse_utils", "FlexibleArgumentParser"),
        Seam("entrypoints.llm", "LLM.from_engine_args", first=("engine_args",)),
        Seam("engine.arg_utils", "EngineArgs.add_cli_args", first=("parser",)),
        Seam("engine.arg_utils", "EngineArgs.create_engine_config"),
        Seam("engine.arg_utils", "EngineArgs", fields=("disable_log_stats", "from_cli_args")),
        Seam("v1.engine.llm_engine", "LLMEngine", fields=("engine_core",)),
        Seam("v1.engine.core_client", "EngineCoreClient.shutdown", parameters=("timeout",)),
    ),
    "server/start/engine_death.py": (
        Seam(
            "v1.engine.async_llm",
            "AsyncLLM",
            fields=("errored", "shutdown", "output_handler", "output_processor"),
        ),
        Seam("v1.engine.output_processor", "OutputProcessor", fields=("request_states",)),
        Seam(
            "v1.engine.output_processor",
            "OutputProcessor.abort_requests",
            first=("request_ids",),
            parameters=("internal",),
        ),
        Seam(
            "entrypoints.launchers.launcher",
            "serve_http",
            mentions=("add_signal_handler", "shutdown"),
        ),
    ),
    "server/self_check.py": (
        Seam("v1.engine.async_llm", "AsyncLLM", fields=("output_processor",)),
        Seam("v1.engine.output_processor", "OutputProcessor.has_unfinished_requests"),
        Seam("v1.engine.exceptions", "EngineDeadError"),
        Seam("config.parallel", "ParallelConfig", fields=("_api_process_rank",)),
        Seam("config.model", "ModelConfig", fields=("max_model_len", "model")),
    ),
    "server/rendering.py": (
        Seam("entrypoints.serve.engine.protocol", "ErrorResponse", fields=("error",)),
        *(
            Seam(f"entrypoints.openai.{api}.serving", name, first=("request",))
            for api, name in (
                ("chat_completion", "OpenAIServingChat.render_chat_request"),
                ("completion", "OpenAIServingCompletion.render_completion_request"),
            )
        ),
        Seam(
            "entrypoints.openai.chat_completion.api_router", "", mentions=("openai_serving_chat",)
        ),
        Seam(
            "entrypoints.openai.completion.api_router", "", mentions=("openai_serving_completion",)
        ),
        Seam(
            "entrypoints.serve.engine.serving",
            "BaseServing._maybe_get_adapters",
            first=("request",),
            parameters=("supports_default_mm_loras",),
        ),
    ),
    "server/start/checked_sae.py": (
        Seam(
            "config.model",
            "ModelConfig",
            fields=("get_hidden_size", "get_total_num_hidden_layers"),
        ),
    ),
}
