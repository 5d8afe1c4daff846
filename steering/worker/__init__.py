"""What runs beside the model: slots, rows, the edit itself, and what is recorded. Free of vLLM."""
