"""Benchmarks on real images: ``python -m benchmarks hippocampus|brain``; each prints its table and its settings."""
