"""What a stack starts with: whether its models and their cards are there, and the aliases that name them.

Nothing here imports a machine-learning library, so that a stack whose models are there starts without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from server.errors import ModelUnknownError
from server.models.registry import ModelUnusableError, Registry
from torchserve.build import descriptions, is_built


def is_installed(data: Path | None, store: Path) -> bool:
    """Whether a store holds the models that this code makes of this data, and a card of each.

    Raises:
        feature_cache.sources.session.SessionError: There is no recording.
    """
    registry = Registry(store)
    return is_built(data, store) and all(
        registry.standing(str(one["version"])).card is not None for one in descriptions(store).values()
    )


def move_aliases(registry: Registry, before: Mapping[str, str], installed: Mapping[str, str]) -> None:
    """Has the aliases of what is installed follow it, unless an operator has promoted another version.

    Args:
        registry: The store's.
        before: Model name → the version that was installed before; empty when there was none.
        installed: Model name → the version that is installed now.
    """
    aliases = registry.aliases()
    for name, version in installed.items():
        current = aliases.get(name)
        if current in (None, before.get(name)) or not _is_usable(registry, str(current)):
            registry.set_alias(name, version)


def _is_usable(registry: Registry, version: str) -> bool:
    try:
        registry.usable(version)
    except (ModelUnknownError, ModelUnusableError):
        return False
    return True
