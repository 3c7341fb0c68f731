"""Which tests run one after the other in the same process, when several processes run the tests (`-n`).

The tests of a file do, as with pytest-xdist's `--dist loadfile`. Files that share servers or models do as well: each
process that asks for a fixture of the whole session makes it, and three groups of model servers, or three trainings,
would take more of two cores than the tests that use them.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

_MODEL_SERVERS: Final = re.compile(r"\b(open_rig|product|product_stack|replica_stack): ")
"""Fixtures of a group of model servers, as a test names them."""
_TRAINED: Final = "tests/unit/torchserve/"
"""Whose conftest.py trains models."""


@cache
def together(path: str) -> str:
    """Name of the group of files that a file of tests belongs to: often its own path.

    Args:
        path: As in the ids of its tests, from the root of the repository.
    """
    if path.startswith(_TRAINED):
        return _TRAINED
    file = Path(__file__).parents[2] / path
    return "model servers" if file.is_file() and _MODEL_SERVERS.search(file.read_text()) else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Any:
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415 - only a run of several processes needs it

    scheduler = LoadFileScheduling(config, log)
    scheduler._split_scope = lambda test: together(test.split("::", 1)[0])
    return scheduler
