"""Adds what is in folders beside this one to what is built: the generated stubs, and the runbook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_ADDED = {"proto/gen/pretrade": "pretrade", "docs/runbook.md": "pretrade/console/runbook.md"}
"""By their places in the repository, those in the package."""


class Neighbours(BuildHookInterface):  # type: ignore[type-arg]  # of any builder's configuration
    """Puts the stubs beside `pretrade.client`, and the page into the console that shows it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Names them to the builder.

        An editable installation finds them where they are, and an sdist holds them already.
        """
        repository = Path(self.root).parent
        for source, target in _ADDED.items():
            if version != "editable" and (repository / source).exists():
                build_data["force_include"][str(repository / source)] = target
