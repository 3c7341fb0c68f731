"""The table of indicators in docs/bars.md: `python -m feature_cache.ta1.page` writes it anew."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from feature_cache.feature_set import Feature
from feature_cache.ta1.definition import CROSS
from feature_cache.ta1.indicators import FLOW, INDICATORS

PAGE: Final = Path(__file__).parents[2] / "docs/bars.md"
BEGIN: Final = "<!-- indicators: python -m feature_cache.ta1.page -->\n"
END: Final = "<!-- end of the indicators -->\n"


def table() -> str:
    """Every feature, without the interval in its name."""
    rows = ["| feature | from | unit | range | for a sell | what it is |", "|---|---|---|---|---|---|"]
    for indicator in INDICATORS:
        given = ", ".join(f"{name} {value:g}" for name, value in indicator.parameters.items())
        source = f"`{indicator.function}`" + (f", {given}" if given else "")
        rows += [_row(one.feature, source) for one in indicator.derived]
    rows += [_row(one, "bars") for one in FLOW]
    rows += [_row(one, "partner") for one in CROSS]
    return "".join(f"{row}\n" for row in rows)


def _row(feature: Feature, source: str) -> str:
    turned = "negated" if feature.signed else f"as `{feature.swapped_with}`" if feature.swapped_with else "same"
    bounded = math.isfinite(feature.lowest) or math.isfinite(feature.highest)
    bounds = f"{_bound(feature.lowest)} to {_bound(feature.highest)}" if bounded else ""
    return f"| `{feature.name}` | {source} | {feature.unit} | {bounds} | {turned} | {feature.doc} |"


def _bound(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "∞"


def with_table(text: str) -> str:
    """The page with the table as it must be."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
