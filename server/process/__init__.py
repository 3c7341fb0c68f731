"""Processes of one server: who starts, replaces and stops them, and what each says of its health."""
