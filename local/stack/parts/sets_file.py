"""The file with a user's feature sets, for the parts that read it: each runs in a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from feature_cache.feature_sets import FILE_VARIABLE


def sets_file(variable: str) -> Mapping[str, str]:
    """The environment that names it: what this variable says, or `FILE_VARIABLE`; empty if neither does."""
    named = os.environ.get(variable) or os.environ.get(FILE_VARIABLE)
    return {variable: str(Path(named).absolute())} if named else {}
