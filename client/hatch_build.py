"""Adds the generated stubs, which are in a folder beside this one, to what is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Stubs(BuildHookInterface):  # type: ignore[type-arg]  # of any builder's configuration
    """Puts proto/gen/pretrade beside `pretrade.client`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Names the folder to the builder.

        An editable installation finds the stubs where they are, and an sdist holds them already.
        """
        stubs = Path(self.root).parent / "proto/gen/pretrade"
        if version != "editable" and stubs.is_dir():
            build_data["force_include"][str(stubs)] = "pretrade"
