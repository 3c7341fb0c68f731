"""A market open for Locust: few trading processes at first, ten times as many at once, and few again.

    locust -f loadtest/locust/locustfile.py,loadtest/locust/market_open.py --headless --host 127.0.0.1:7001

`QUIET_USERS`, `TIMES` and `PHASE_SECONDS` set how many there are, and how long each of the four phases takes.
"""

# As in locustfile.py.
# mypy: disable-error-code="import-not-found,misc,unused-ignore"

from __future__ import annotations

import math
import os

from locust import LoadTestShape

QUIET_USERS = int(os.environ.get("QUIET_USERS", "10"))
TIMES = float(os.environ.get("TIMES", "10"))
PHASE_SECONDS = float(os.environ.get("PHASE_SECONDS", "30"))


def users_at(phase: float) -> int | None:
    """How many users there are, by phases since the beginning: quiet, open, going back, quiet; None when it is over."""
    if phase >= 4:
        return None
    back = min(1.0, max(0.0, phase - 2))
    return QUIET_USERS if phase < 1 else math.ceil(QUIET_USERS * (TIMES - (TIMES - 1) * back))


class MarketOpen(LoadTestShape):
    """Locust asks it once a second."""

    def tick(self) -> tuple[int, float] | None:
        """Users, and how many of them may come or go in a second."""
        run_seconds: float = self.get_run_time()  # type: ignore[no-untyped-call]
        users = users_at(run_seconds / PHASE_SECONDS)
        return None if users is None else (users, QUIET_USERS * TIMES)
