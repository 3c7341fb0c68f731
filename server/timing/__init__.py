"""Deadlines, recent latencies and the delays of the event loop."""
