"""The label that the models learn, as far as a server needs to know it: what the mid does after an order."""

from __future__ import annotations

from typing import Final

HORIZON_SECONDS: Final = 5.0
"""How long after an order the mid is looked at again."""
WORST_MARKOUT_BPS: Final = -1.0
"""An order is *eligible* when its side-signed markout is not worse than this, in basis points."""
