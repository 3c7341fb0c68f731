"""Seals what comes back to the console, so that nobody else can make or change it."""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

KEY_BYTES: Final = 32


def sealed(key: bytes, purpose: str, content: str) -> str:
    """The content with its seal.

    Args:
        key: The secret of whoever seals.
        purpose: What it is for: nothing that is sealed for one purpose passes for another.
        content: Without secrets; it can be read.
    """
    return f"{content}.{_seal(key, purpose, content)}"


def unsealed(key: bytes, purpose: str, shown: str) -> str | None:
    """The content of what was sealed; None where it was not, or was changed."""
    content, _, seal = shown.rpartition(".")
    return content if hmac.compare_digest(seal.encode(), _seal(key, purpose, content).encode()) else None


def _seal(key: bytes, purpose: str, content: str) -> str:
    return hmac.new(key, f"pretrade {purpose}\n{content}".encode(), hashlib.sha256).hexdigest()
