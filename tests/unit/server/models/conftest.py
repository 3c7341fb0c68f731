"""Everything here runs in virtual time: no test waits for a timer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from support.virtual_time import VirtualTimeLoop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"virtual_time": VirtualTimeLoop}
