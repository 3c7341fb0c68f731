"""Counts the ledgers of decisions that go together, by stage.

`tally_c.pyx`, where it is compiled, does the same with one look at each entry. Tests hold one against the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from feature_cache.compiled import compiled

if TYPE_CHECKING:
    from fallback.budget import Use
    from server.timing.histogram import Histogram


def count_plainly(
    ledgers: list[list[Use]],
    used_seconds: Mapping[int, Histogram],
    allowed_seconds: Mapping[int, Histogram],
    skips: Counter[tuple[int, int]],
    times: int = 1,
) -> None:
    """Counts what each stage used and was allowed, or why it was passed over.

    Args:
        ledgers: `Budget.uses` of each decision.
        used_seconds: By stage; with the usual edges of latencies.
        allowed_seconds: The same.
        skips: By (stage, why it was passed over).
        times: How many decisions have each of the ledgers.
    """
    for uses in ledgers:
        for stage, allowed, used, skipped in uses:
            if skipped:
                skips[stage, skipped] += times
            else:
                used_seconds[stage].observe(used, times)
                allowed_seconds[stage].observe(allowed, times)


_compiled = compiled("server.decision.tally_c")
count: Final = count_plainly if _compiled is None else _compiled.count
"""`count_plainly`, or what does the same faster."""
