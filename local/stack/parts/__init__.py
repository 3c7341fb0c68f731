"""One server of the embedded stack a file: its program, its settings, and when it is ready."""
