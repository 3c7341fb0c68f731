"""The servers of the embedded stack, one per file: its program, its settings, and when it is ready."""
