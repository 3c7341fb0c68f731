"""Replays recorded decisions: as they were made, or with another model or threshold."""
