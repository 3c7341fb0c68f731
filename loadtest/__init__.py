"""Load scenarios and the benchmark; a client like any other."""
