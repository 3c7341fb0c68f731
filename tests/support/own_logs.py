"""Confines a test's changes of logging to that test.

A command that a test runs in the test's own process sets up logging as if the process were the command's: for good, at
the command's level, to a standard error that is closed when the command ends, and with loggers that cache all this from
their first line on. Later tests would miss lines, or fail where something is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import structlog


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """Undoes what the test configures of structlog and of the root logger."""
    root = logging.getLogger()
    handlers, level = set(root.handlers), root.level
    with pytest.MonkeyPatch.context() as patch:
        # A logger that has cached its configuration cannot be made to forget it.
        patch.setattr(structlog, "configure", partial(_configure_without_cache, structlog.configure))
        yield
    structlog.reset_defaults()
    for handler in set(root.handlers) - handlers:
        root.removeHandler(handler)
    root.setLevel(level)


def _configure_without_cache(configure: Callable[..., None], **settings: Any) -> None:
    configure(**settings | {"cache_logger_on_first_use": False})
