"""The parts of the simulated market: value, order flow, book and scenarios.

`feature_cache/sources/simulator.py` runs them.
"""
