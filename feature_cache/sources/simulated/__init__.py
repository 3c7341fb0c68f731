"""The parts of the simulated market: value, order flow, book and scenarios. `sources/simulator.py` runs them."""
