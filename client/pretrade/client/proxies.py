"""Keeps connections between parts of the embedded stack from going through a proxy."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Final

_OURSELVES: Final = ("127.0.0.1", "localhost", "::1")


def spare_this_machine(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds this machine's own addresses to the exceptions from a proxy that a user has set, for us and our children.

    Without it, gRPC and urllib would ask the proxy for 127.0.0.1 as well, which is another machine there.
    """
    set_names = {name.lower() for name, value in environment.items() if value}
    if not any(name.endswith("_proxy") and not name.startswith("no_") for name in set_names):
        return
    # gRPC reads the lower-case names alone, and of those `no_grpc_proxy` first. urllib prefers the lower-case one.
    given = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    environment["no_proxy"] = _with_ourselves(given)
    if "no_grpc_proxy" in environment:
        environment["no_grpc_proxy"] = _with_ourselves(environment["no_grpc_proxy"])


def _with_ourselves(exceptions: str) -> str:
    names = [name.strip() for name in exceptions.split(",") if name.strip()]
    return ",".join(dict.fromkeys((*names, *_OURSELVES)))
