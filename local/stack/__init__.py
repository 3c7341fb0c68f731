"""The embedded stack: real servers as child processes, started and stopped together."""
