"""A flag provider that requires a key, as most do."""

from __future__ import annotations

from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider


def make(sdk_key: str) -> InMemoryProvider:
    """A provider by which every flag is on.

    Raises:
        ValueError: That is no key of it; says which.
    """
    if not sdk_key.startswith("sdk-"):
        raise ValueError(f"{sdk_key} is no key")
    flag = InMemoryFlag("on", {"on": True, "off": False})
    return InMemoryProvider({"shadow": flag, "cached_score": flag})
