"""How long a model may decide: until some days after the newest market that it knows.

Markets change, so a model expires. Both dates are the market's and not those of the build: the same samples give the
same archive, and a server compares the expiry with the instant of the market that it decides on (`fallback/guards.py`).
A model of an old recording therefore decides on a replay of that recording, and has expired on the market of today.

A simulated market has no dates, and does not change. What was learnt from one does not expire.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torchserve.dataset import Samples

VALID_DAYS: Final = 30.0
"""By default. A month of a market that trades day and night holds most of what a few monotone features see."""
MOST_DAYS: Final = 3_650.0
_DAY_SECONDS: Final = 86_400


def expires_at(samples: Samples, valid_days: float | None) -> int:
    """Unix seconds from which on a model of these samples must not decide; 0 for never.

    Args:
        samples: What it was made from.
        valid_days: How many days after the end of the newest horizon in them; None: for ever.
    """
    if valid_days is None or samples.is_simulated:
        return 0
    return samples.until + round(valid_days * _DAY_SECONDS)


def expiry_text(expires_at: int, now: float | None = None) -> str:
    """What a model may do until when, for people: "may decide on markets until …".

    Args:
        expires_at: See `expires_at`.
        now: Unix seconds, to be told if that is over on the market of today; None where it does not matter.
    """
    if not expires_at:
        return "does not expire"
    until = f"may decide on markets until {datetime.fromtimestamp(expires_at, UTC):%Y-%m-%d %H:%M} UTC"
    if now is None or now < expires_at:
        return until
    return f"{until}: on today's market it has expired, and every TRADE of it is ABSTAIN; --valid-days changes that"
