"""What is wrong with what somebody brought."""

from __future__ import annotations


class BroughtError(ValueError):
    """A model or its data cannot be taken as they are; the message says why, and what to change."""
