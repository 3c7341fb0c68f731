"""The embedded stack: the product and everything it stands on, on this machine, with its demo and benchmarks."""
