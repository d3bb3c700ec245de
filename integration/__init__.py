"""Programs of a checkout, on the public API of `lad_kernels`: a bandit, a trainer, memory, and one demo of all."""
