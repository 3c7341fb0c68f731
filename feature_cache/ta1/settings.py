"""Settings of `ta1`, from `PRETRADE_TA1_*` variables of the feature worker."""

from __future__ import annotations

import re
from typing import Final

from pydantic import SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX: Final = "PRETRADE_TA1_"
ALL_OTHERS: Final = "*"
_INSTRUMENT: Final = re.compile(r"[A-Za-z0-9_-]{1,40}\.[A-Za-z0-9_-]{1,20}")


class Ta1Settings(BaseSettings):
    """A wrong value refuses to start."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    partners: dict[str, str] = {}
    """Instrument whose market the `partner_…` features of another one look at, as a JSON object, for example
    `{"ETHUSDT.BINANCE": "BTCUSDT.BINANCE"}`; `*` stands for all others. Without a partner they are undefined. The
    partner must be on a partition of the same worker."""
    bars_database_url: SecretStr | None = None
    """SQLAlchemy URL of the database that `python -m feature_cache.bars` writes to. A worker that starts then looks its
    instruments' last bars up, and indicators go on as if it had not been away; without it they begin anew."""

    @field_validator("partners")
    @classmethod
    def _are_instruments(cls, partners: dict[str, str]) -> dict[str, str]:
        for name, partner in partners.items():
            if name != ALL_OTHERS and not _INSTRUMENT.fullmatch(name):
                raise ValueError(f"{name[:80]!r} must be SYMBOL.VENUE, or {ALL_OTHERS}")
            if not _INSTRUMENT.fullmatch(partner):
                raise ValueError(f"the partner of {name}, {partner[:80]!r}, must be SYMBOL.VENUE")
            if name == partner:
                raise ValueError(f"{name} cannot be its own partner")
        return partners

    @field_validator("bars_database_url")
    @classmethod
    def _is_supported(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            from feature_cache.bars.store import BarStore  # noqa: PLC0415 - SQL, which few need

            BarStore(url.get_secret_value())
        return url

    def partner_of(self, instrument: str) -> str | None:
        """The partner of an instrument; None for none."""
        partner = self.partners.get(instrument) or self.partners.get(ALL_OTHERS)
        return None if partner == instrument else partner
