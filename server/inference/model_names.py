"""What the parts of a server with several models are called.

A model server's own readiness check reads this, too, and has no library for settings.
"""

from __future__ import annotations

from typing import Final

DEFAULT: Final = "default"
"""The model of an order that no rule fits."""


def qualified(model: str, part: str) -> str:
    """What a replica, alias or other part of a model is called: `scalper/primary`, or just `primary` of the default."""
    return part if model == DEFAULT else f"{model}/{part}"
