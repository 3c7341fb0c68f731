"""`python -m feature_cache.sources.replay`: publishes recorded sessions, as `pretrade replay` does."""

from __future__ import annotations

import typer

from feature_cache.sources.cli import replay

if __name__ == "__main__":
    typer.run(replay)
