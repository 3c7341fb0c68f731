"""`ta1` as an entry point of `pretrade.features` names it: the set, and how it is computed."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

from feature_cache.feature_set import FeatureSetError
from feature_cache.feature_sets import ComputedSet
from feature_cache.ta1.definition import TA1
from feature_cache.ta1.settings import Ta1Settings

if TYPE_CHECKING:
    from feature_cache.ta1.computer import Ta1Computer
    from feature_cache.ta1.past import Past


def make(instrument: str) -> Ta1Computer:
    """Makes the computer of an instrument, with the settings of this process.

    Raises:
        FeatureSetError: TA-Lib is missing.
        pydantic.ValidationError: A setting is wrong.
    """
    return _made(instrument, Ta1Settings(), None)


def resume(instrument: str) -> Ta1Computer:
    """The same in a worker: its history begins with the bars that were stored before, if the settings say where.

    Raises as `make` does.
    """
    settings = Ta1Settings()
    url = settings.bars_database_url
    return _made(instrument, settings, None if url is None else _past(url.get_secret_value()))


def _made(instrument: str, settings: Ta1Settings, past: Past | None) -> Ta1Computer:
    try:
        from feature_cache.ta1.computer import BOARD, Ta1Computer  # noqa: PLC0415 - only where it is computed
    except ImportError as error:
        raise FeatureSetError(f"ta1 is computed by TA-Lib: pip install 'pretrade-server[ta]' ({error})") from error
    return Ta1Computer(instrument, settings.partner_of(instrument), BOARD, past)


@cache
def _past(database_url: str) -> Past:
    """One for all instruments of this process."""
    from feature_cache.ta1.past import Past, reader  # noqa: PLC0415 - SQL, which few need

    return Past(reader(database_url))


COMPUTED: Final = ComputedSet(TA1, make, resume)
