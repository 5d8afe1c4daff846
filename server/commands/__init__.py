"""The subcommands of ``vllm-sae``."""
