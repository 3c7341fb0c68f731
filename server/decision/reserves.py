"""What of a decision's time is kept for its end: for the audit, and for sending the reply."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fallback.budget import BudgetSettings
    from server.timing.loop_lag import LoopLag


class Reserves:
    """Grows with what the audit recently took, and with how late the event loop is.

    Args:
        settings: The least that is kept.
        loop_lag: How late the event loop is.
    """

    def __init__(self, settings: BudgetSettings, loop_lag: LoopLag) -> None:
        self._for_fallback = settings.fallback_reserve_seconds
        self._for_audit = settings.audit_reserve_seconds
        self._for_reply = settings.reply_reserve_seconds
        self._loop_lag = loop_lag

    def from_models(self, allowed_seconds: float, audit_seconds: float) -> float:
        """What model attempts may not touch.

        The audit's share is the seconds that it recently took in 19 of 20 cases, and the reply's reserve: where the
        disk or the machine is slow, a model's score that could no longer be made durable in time would be worth
        nothing. An attempt whose time is up ends as late as the event loop is. At least the reserve of the settings, at
        most half of what is allowed.
        """
        needed = audit_seconds + self.for_reply(allowed_seconds) + self._loop_lag.p99
        return self._for_fallback + max(self._for_audit, min(needed, allowed_seconds / 2))

    def for_reply(self, allowed_seconds: float) -> float:
        """The time that waiting for the audit must leave for the reply: the setting plus the event loop's delay.

        It is at most a quarter of the allowed time. A reply that is not sent by then comes too late.
        """
        late = self._for_reply + self._loop_lag.p95
        return max(self._for_reply, min(late, allowed_seconds / 4))
