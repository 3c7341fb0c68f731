"""The files of others that the console serves are theirs, unchanged, with their licences."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

import pretrade.console

ROOT: Final = Path(pretrade.console.__file__).parent
VENDORED: Final = {
    "htmx-2.0.11.min.js": "d6fdc75f204e6bdefa99b69bf1e6d4ac69b8a364f77929f45c13476b4000f717",
    "htmx.LICENSE.txt": "d3d2456f76414f2456104660ebd65aff1c04cd7966b942bdabd63f3cdb316a38",
    "uplot-1.6.32.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uplot-1.6.32.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uplot.LICENSE.txt": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
"""SHA-256 of each, as its package on npm has it."""


def test_vendored_files_are_those_of_their_packages() -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (ROOT / "static/vendor").iterdir()}
    assert found == VENDORED


def test_the_page_says_where_they_are_from() -> None:
    page = (Path(__file__).parents[3] / "docs/console.md").read_text()
    for name, digest in VENDORED.items():
        if not name.endswith(".LICENSE.txt"):
            assert name in page
            assert digest in page


def test_no_template_has_code_or_style_of_its_own_or_names_another_site() -> None:
    for path in (ROOT / "templates").glob("*.html"):
        text = path.read_text()
        assert not re.findall(r"<script(?! src=\"/static/)|<style|\sstyle=|\son[a-z]+=|\bhx-on|https?://", text), (
            path.name
        )


def test_every_file_that_a_page_names_is_there() -> None:
    text = "".join(path.read_text() for path in (ROOT / "templates").glob("*.html"))
    named = set(re.findall(r'"/static/([^"]+)"', text))
    assert "console.js" in named
    assert all((ROOT / "static" / name).is_file() for name in named)


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`. Source: WCAG 2.2."""
    shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in shares]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


TEXT: Final = {
    "paper": ("ink", "faint", "accent", "good", "warn", "bad"),
    "sheet": ("ink", "faint", "accent", "good", "warn", "bad"),
    "good-sheet": ("good", "faint", "accent", "ink"),
    "bad-sheet": ("bad", "faint", "accent", "ink"),
    "accent": ("on-accent",),
    "bad": ("on-bad",),
    "heat2": ("ink",),
    "heat3": ("ink",),
    "heat4": ("ink",),
    "heat5": ("ink",),
    "heat6": ("on-heat6",),
}
"""What is written on each colour."""


def test_text_can_be_read_on_every_colour_by_day_and_by_night() -> None:
    """The browser test looks at what pages really paint; this says which colour is wrong."""
    sheet = (ROOT / "static/console.css").read_text()
    both = {name: (light, dark) for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", sheet)}
    assert set(re.findall(r"var\(--([\w-]+)\)", sheet)) == set(both), "each has both colours, and none is unused"
    for ground, texts in TEXT.items():
        for text in texts:
            for place, when in enumerate(("light", "dark")):
                found = contrast(both[ground][place], both[text][place])
                assert found >= 4.5, f"{text} on {ground} has {found:.2f} when it is {when}"
    for line in ("accent", "second", "faint"):
        assert all(contrast(both["paper"][place], both[line][place]) >= 3 for place in (0, 1)), f"lines of {line}"
