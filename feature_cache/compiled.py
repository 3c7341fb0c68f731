"""Which of the modules that have a compiled twin run compiled.

A module `name` may have a Cython source `name_c.pyx` beside it. `make setup` and a build of the wheel compile it, where
there is a compiler. Without one, Python code does the same, more slowly; the same tests run on both.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Final

SWITCH: Final = "PRETRADE_COMPILED"
"""The environment variable that says `0` where everything is to be interpreted."""
SOURCES: Final = (
    "feature_cache.domain_c",
    "feature_cache.store.l1_c",
    "server.audit.store.decision_rows_c",
    "server.decision.decision_wire_c",
    "server.decision.entry_wire_c",
    "server.decision.order_wire_c",
    "server.decision.tally_c",
    "server.envoy.lane_c",
    "server.journal.ranges_c",
)
"""Every module that is to be compiled."""
_ROOT: Final = Path(__file__).parents[1]


def digest(name: str) -> str:
    """The SHA-256 of a module's Cython source, which a compiled module names as its own."""
    return hashlib.sha256(source(name).read_bytes()).hexdigest()


def source(name: str) -> Path:
    """Where a module's Cython source is."""
    return _ROOT.joinpath(*name.split(".")).with_suffix(".pyx")


def compiled(name: str) -> ModuleType | None:
    """The compiled module of this name; None when there is none, or it was not made from today's source."""
    if os.environ.get(SWITCH) == "0":
        return None
    beside = source(name)
    if not any(beside.with_suffix(suffix).exists() for suffix in EXTENSION_SUFFIXES):
        return None
    try:
        module = importlib.import_module(name)
    except ImportError:  # of another Python or another machine
        return None
    return module if getattr(module, "SOURCE_SHA256", "") == digest(name) else None


def in_use() -> tuple[str, ...]:
    """The modules that run compiled."""
    return tuple(name for name in SOURCES if compiled(name) is not None)
