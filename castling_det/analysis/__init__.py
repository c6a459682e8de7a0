"""Benchmarks and maintainers' figures, on their way to tools/."""
