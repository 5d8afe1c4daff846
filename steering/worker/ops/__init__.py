"""The edit and the conditions: a float32 reference, kernels for CUDA and CPU, a torch version."""
