"""Kernels on a GPU, beside what a user would pick instead: `python -m benchmarks.gpu` (see benchmarks/README.md)."""
