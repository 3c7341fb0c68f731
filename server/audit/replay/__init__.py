"""Deciding again what was decided, as it was or as it might have been."""
