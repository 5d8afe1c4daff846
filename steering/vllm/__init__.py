"""The only code that knows vLLM's insides: plugin, worker, runners, hook points, scheduler."""
