"""The OpenAPI document as a port serves it: the part that is about its own paths."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

FILE: Final = Path(__file__).parent / "static/openapi.json"
"""All of it; `server/http/openapi.py` writes it."""
_SHARED: Final = ("schemas", "responses", "parameters")
"""The components that go with the paths that use them."""


def document_of(paths: Collection[str]) -> bytes:
    """The document of a port.

    Args:
        paths: What the port answers.
    """
    found: dict[str, Any] = json.loads(FILE.read_text())
    found["paths"] = {path: item for path, item in found["paths"].items() if path in paths}
    tags = {tag for item in found["paths"].values() for operation in item.values() for tag in operation["tags"]}
    found["tags"] = [tag for tag in found["tags"] if tag["name"] in tags]
    components = found["components"]
    used = _used(found["paths"], components)
    for kind in _SHARED:
        components[kind] = {name: one for name, one in components[kind].items() if (kind, name) in used}
    return json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()


def _used(paths: object, components: dict[str, Any]) -> set[tuple[str, str]]:
    """The components that something refers to, by kind and name."""
    found: set[tuple[str, str]] = set()
    left = list(_references(paths))
    while left:
        kind, name = left.pop()
        if (kind, name) not in found:
            found.add((kind, name))
            left += _references(components[kind][name])
    return found


def _references(part: object) -> Iterator[tuple[str, str]]:
    """What a part of the document refers to."""
    if isinstance(part, list):
        for one in part:
            yield from _references(one)
    elif isinstance(part, dict):
        if isinstance(reference := part.get("$ref"), str):
            _, _, kind, name = reference.split("/")
            yield kind, name
        for one in part.values():
            yield from _references(one)
