"""The compiled twins of modules, for tests that hold both to one behaviour."""

from __future__ import annotations

import os
from typing import Any

import pytest

from server.compiled import SWITCH, compiled


def compiled_here(name: str) -> Any:
    """A compiled module; the test is skipped where it is not compiled."""
    module = compiled(name)
    if module is None:
        why = f"{SWITCH}=0" if os.environ.get(SWITCH) == "0" else "nothing is compiled here: `make setup` says why"
        pytest.skip(why)
    return module
