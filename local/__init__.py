"""The embedded stack: the product and everything it depends on, on this machine, with its demo and benchmarks."""
