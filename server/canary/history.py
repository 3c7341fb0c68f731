"""How the evidence of a canary grew, for people who want to see where it leads.

However long a canary takes, a bounded number of looks is kept, evenly spread over its time: when that many are there,
every other one is forgotten, and from then on looks are half as frequent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from server.canary.evidence import Evidence

MOST: Final = 120
"""Looks that are kept; even, so that after the forgetting the next look is as far away as all others are."""


@dataclass(slots=True)
class CheckHistory:
    """One check, with a value for each look."""

    samples: list[int] = field(default_factory=list)
    canary: list[float] = field(default_factory=list)
    """NaN without evidence."""
    champion: list[float] = field(default_factory=list)
    """NaN without evidence."""


class EvidenceHistory:
    """The evidence of one canary over time, in columns."""

    def __init__(self) -> None:
        self.at_ns: Final[list[int]] = []
        """When each look was, nanoseconds since the Unix epoch."""
        self.weight: Final[list[float]] = []
        """The canary's share of the order flows then."""
        self.checks: Final[dict[str, CheckHistory]] = {}
        """By the name of the check."""
        self._every = 1
        self._offered = 0

    def look(self, evidence: Evidence, weight: float, now_ns: int) -> None:
        """Takes a look, if one is due.

        Args:
            evidence: Always that of the same canary.
            weight: Its share of the order flows.
            now_ns: Nanoseconds since the Unix epoch.
        """
        is_due = self._offered % self._every == 0
        self._offered += 1
        if not is_due:
            return
        if len(self.at_ns) == MOST:
            self._every *= 2
            for column in self._columns():
                del column[1::2]
        self.at_ns.append(now_ns)
        self.weight.append(weight)
        for name, check in evidence.checks.items():
            of_check = self.checks.setdefault(name, CheckHistory())
            of_check.samples.append(check.samples)
            of_check.canary.append(check.canary)
            of_check.champion.append(check.champion)

    def _columns(self) -> Iterator[list[Any]]:
        yield from (self.at_ns, self.weight)
        for check in self.checks.values():
            yield from (check.samples, check.canary, check.champion)
