"""Refuses what asks about an instrument that the server does not follow."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Final

from server.errors import UnknownInstrumentError

_MOST_SHOWN: Final = 64


def check_followed(field: str, name: str, followed: Sequence[str]) -> None:
    """Raises UnknownInstrumentError, with the nearest that is followed, if the server does not follow `name`."""
    if name in followed:
        return
    nearest = next(iter(difflib.get_close_matches(name, followed, 1)), "")
    hint = f"; did you mean {nearest}?" if nearest else ""
    raise UnknownInstrumentError(f"{field}: this server does not follow {shown(name)}{hint}")


def shown(name: str) -> str:
    """What a caller named, for a message."""
    return json.dumps(name[:_MOST_SHOWN])
