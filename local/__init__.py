"""The embedded stack and the `pretrade` command."""
