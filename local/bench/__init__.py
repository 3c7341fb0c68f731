"""Benchmarks around the embedded stack, a file each."""
