"""Load generators: callers in Python and h2load, and the flow of orders that all of them draw from."""
