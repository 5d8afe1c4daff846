"""What happens before the port opens: flags, SAEs, the engine's arguments."""
