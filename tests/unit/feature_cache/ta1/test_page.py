from __future__ import annotations

from feature_cache.ta1.definition import TA1
from feature_cache.ta1.page import PAGE, table, with_table


def test_the_page_has_the_table_of_the_indicators_as_they_are() -> None:
    text = PAGE.read_text()
    assert with_table(text) == text, "run `python -m feature_cache.ta1.page`"


def test_every_feature_has_a_row() -> None:
    names = {name.removesuffix("_1s").removesuffix("_10s") for name in TA1.names}
    assert all(f"| `{name}` |" in table() for name in names)
    assert "| `aroon_up_14` | `AROON` |  | 0 to 100 | as `aroon_down_14` |" in table()
