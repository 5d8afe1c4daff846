"""The edit itself: a float32 reference, a batched torch version, and a Triton kernel."""
