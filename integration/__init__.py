"""Programs on the public API of `lad_kernels`: a bandit, a trainer, a memory measurement, and one demo of all."""
