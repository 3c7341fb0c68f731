"""Chooses the edge that speaks HTTP/2 with the callers when the settings leave it open."""

from __future__ import annotations

import importlib.util
import sys
from typing import Literal

Edge = Literal["grpcio", "envoy"]
_OF_ENVOY = ("pyvoy", "envoy", "find_libpython")


def best() -> Edge:
    """Envoy where it can run: on Linux, with its wheel and a Python that has a shared library. Else grpc.aio."""
    if sys.platform != "linux" or any(importlib.util.find_spec(name) is None for name in _OF_ENVOY):
        return "grpcio"
    import find_libpython  # noqa: PLC0415 - an extra

    return "grpcio" if find_libpython.find_libpython() is None else "envoy"
