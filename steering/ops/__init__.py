"""The edit itself: a float32 reference, kernels for CUDA and CPU, and a batched torch version."""
