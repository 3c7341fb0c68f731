"""Flags and trading state."""
