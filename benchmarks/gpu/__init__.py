"""A quarter of an hour on one CUDA device: `benchmarks/gpu.sh`."""
