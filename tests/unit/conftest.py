"""Unit tests see no settings but those they make: what a user's shell or another test has set stays outside."""

from __future__ import annotations

import os

import pytest

from feature_cache.compiled import SWITCH


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PRETRADE_") and name != SWITCH]:
        monkeypatch.delenv(name)
