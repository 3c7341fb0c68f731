"""The compiled twins of modules, for tests that hold both to one behaviour."""

from __future__ import annotations

import os
from typing import Any

import pytest

import hatch_compile
from feature_cache.compiled import SWITCH, compiled


def compiled_here(name: str) -> Any:
    """A compiled module. The test is skipped where nothing can be compiled, and fails where it was forgotten."""
    module = compiled(name)
    if module is None:
        if os.environ.get(SWITCH) == "0":
            pytest.skip(f"{SWITCH} is 0")
        try:
            hatch_compile.compiler(portable=False)
        except hatch_compile.Unavailable as why:
            pytest.skip(f"nothing can be compiled here: {why}")
        pytest.fail(f"{name} is not compiled from its source of now: `make setup` does it")
    return module
