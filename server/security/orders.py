"""Checks what callers of the decision port may ask, for each order: a batch or a stream carries many."""

from __future__ import annotations

from feature_cache.token_bucket import TokenBuckets
from server.errors import PermissionDeniedError, RateLimitedError
from server.security.identity import Caller
from server.security.refusals import Refusals

_PLANE = "decision"


class OrderAccess:
    """Holds orders against the rate and the strategies of their caller. An open port has no callers and no limits.

    Args:
        rates: Buckets of the callers' orders.
        refusals: Told of what was refused.
    """

    def __init__(self, rates: TokenBuckets, refusals: Refusals) -> None:
        self._rates = rates
        self._refusals = refusals

    def charge(self, caller: Caller | None) -> None:
        """Takes one order out of the caller's bucket.

        Raises:
            RateLimitedError: There is none in it.
        """
        if caller is None or (rate := caller.grants.decisions_per_second) is None:
            return
        if not self._rates.take(caller.name, rate):
            reason = "RATE_LIMITED"
            self._refusals.counts[_PLANE, reason] += 1  # too many to record each
            raise RateLimitedError(reason, f"more than {rate:g} orders a second", 1 / rate)

    def check_strategy(self, caller: Caller | None, strategy: str) -> None:
        """Returns when the caller may use the strategy.

        Raises:
            PermissionDeniedError: It is another one's; names the strategy.
        """
        if caller is None or caller.grants.allow_strategy(strategy):
            return
        reason, attempt = "STRATEGY_NOT_ALLOWED", caller.attempt
        self._refusals.note(_PLANE, attempt.method, attempt.peer(), caller.name, reason)
        raise PermissionDeniedError(
            reason, f"strategy: {caller.name} may not use {strategy!r}", "strategy", {"strategy": strategy}
        )
