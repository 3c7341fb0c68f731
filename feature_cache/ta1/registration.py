"""`ta1` and `ta1_long` as entry points of `pretrade.features` name them: the sets, and how they are computed.

The functions raise FeatureSetError if TA-Lib is missing, and pydantic.ValidationError if a setting is wrong.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

from feature_cache.feature_set import FeatureSetError
from feature_cache.feature_sets import ComputedSet
from feature_cache.ta1.definition import LONG_INTERVALS, TA1, TA1_LONG
from feature_cache.ta1.settings import Ta1Settings

if TYPE_CHECKING:
    from feature_cache.ta1.computer import Indicators, Ta1Computer
    from feature_cache.ta1.past import Past


def make(instrument: str) -> Ta1Computer:
    """Makes the computer of `ta1` of an instrument, with the settings of this process."""
    return _made(instrument, Ta1Settings(), None)


def resume(instrument: str) -> Ta1Computer:
    """The same in a worker: its history begins with the bars that were stored before, if the settings say where."""
    settings = Ta1Settings()
    return _made(instrument, settings, _past_of(settings))


def make_long(instrument: str) -> Indicators:
    """Makes the computer of `ta1_long` of an instrument."""
    return _made_long(instrument, None)


def resume_long(instrument: str) -> Indicators:
    """The same in a worker, as `resume`."""
    return _made_long(instrument, _past_of(Ta1Settings()))


def _made(instrument: str, settings: Ta1Settings, past: Past | None) -> Ta1Computer:
    try:
        from feature_cache.ta1.computer import BOARD, Ta1Computer  # noqa: PLC0415 - only where it is computed
    except ImportError as error:
        raise _without_talib(error) from error
    return Ta1Computer(instrument, settings.partner_of(instrument), BOARD, past)


def _made_long(instrument: str, past: Past | None) -> Indicators:
    try:
        from feature_cache.ta1.computer import Indicators  # noqa: PLC0415 - only where it is computed
    except ImportError as error:
        raise _without_talib(error) from error
    return Indicators(instrument, LONG_INTERVALS, past)


def _without_talib(error: ImportError) -> FeatureSetError:
    return FeatureSetError(f"ta1 is computed by TA-Lib: pip install 'pretrade-server[ta]' ({error})")


def _past_of(settings: Ta1Settings) -> Past | None:
    url = settings.bars_database_url
    return None if url is None else _past(url.get_secret_value())


@cache
def _past(database_url: str) -> Past:
    """One for all instruments of this process."""
    from feature_cache.ta1.past import Past, reader  # noqa: PLC0415 - SQL, which few need

    return Past(reader(database_url))


COMPUTED: Final = ComputedSet(TA1, make, resume)
COMPUTED_LONG: Final = ComputedSet(TA1_LONG, make_long, resume_long)
