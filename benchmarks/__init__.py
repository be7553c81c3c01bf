"""Benchmarks of adapters, optimizers and merging against peers; figures: benchmarks/README.md."""
