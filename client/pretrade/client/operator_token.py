"""Where a server stores its operator token, which `server.security.operator` makes and checks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

DEFAULT_JOURNAL: Final = Path("pretrade-journal.db")
"""Where a server stores its journal by default."""
_JOURNAL: Final = "PRETRADE_JOURNAL__PATH"


def token_path(journal: Path) -> Path:
    """The token's file of the server that keeps this journal; one for all of its processes."""
    return journal.with_name(f"{journal.name}.operator-token")


def path_from(environment: Mapping[str, str] = os.environ) -> Path:
    """The token's file of a server that was given these variables and runs in this directory."""
    return token_path(Path(environment.get(_JOURNAL) or DEFAULT_JOURNAL))
