"""`ta1` as an entry point of `pretrade.features` names it: the set, and how it is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from feature_cache.feature_sets import ComputedSet
from feature_cache.ta1.definition import TA1
from feature_cache.ta1.settings import Ta1Settings

if TYPE_CHECKING:
    from feature_cache.ta1.computer import Ta1Computer


def make(instrument: str) -> Ta1Computer:
    """Makes the computer of an instrument, with the settings of this process.

    Raises:
        ImportError: TA-Lib is missing.
        pydantic.ValidationError: A setting is wrong.
    """
    from feature_cache.ta1.computer import BOARD, Ta1Computer  # noqa: PLC0415 - only where it is computed

    return Ta1Computer(instrument, Ta1Settings().partner_of(instrument), BOARD)


COMPUTED: Final = ComputedSet(TA1, make)
