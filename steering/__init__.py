"""Per-request steering of a language model through sparse-autoencoder features, inside vLLM."""
