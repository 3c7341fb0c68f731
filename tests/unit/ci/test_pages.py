"""README and the pages in docs/ name what exists."""

from __future__ import annotations

import html
import re
import subprocess
from pathlib import Path

import pytest
from support import failures

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "loadtest/README.md", ROOT / "k8s/README.md"]

TERMINALS = sorted(page for page in ROOT.glob("docs/*.svg") if "rich-terminal" in page.read_text())
PLOTS = sorted(ROOT.glob("docs/models/*/*.svg"))
_LETTER = 12.2
"""Width of a letter in them."""


def test_the_page_of_failures_is_current() -> None:
    assert failures.PAGE.read_text() == failures.page(), "run `make pages`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_it_links_to_exists(page: Path) -> None:
    missing = [link for link in _links(page) if not (page.parent / link.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_heading_it_links_to_exists(page: Path) -> None:
    to_headings = [link.partition("#") for link in _links(page) if "#" in link]
    missing = [
        f"{path}#{heading}"
        for path, _, heading in to_headings
        if heading not in _headings(page.parent / path if path else page)
    ]
    assert not missing


@pytest.mark.parametrize("picture", TERMINALS, ids=lambda picture: picture.name)
def test_a_picture_of_a_terminal_is_as_it_was_drawn(picture: Path) -> None:
    """A name that was replaced in the file is squeezed or stretched to the old one's width, and cannot be read."""
    texts = re.findall(r'textLength="([\d.]+)"[^>]*>([^<]*)</text>', picture.read_text())
    assert texts
    assert [text for width, text in texts if abs(float(width) - _LETTER * len(html.unescape(text))) > 0.1] == []


@pytest.mark.parametrize("picture", PLOTS, ids=lambda picture: f"{picture.parent.name} {picture.stem}")
def test_no_legend_covers_what_it_explains(picture: Path) -> None:
    drawn = picture.read_text()

    def across(identifier: str) -> list[float]:
        path = re.search(rf'id="{identifier}">\s*<path d="([^"]+)"', drawn)
        assert path is not None
        return [float(x) for x in re.findall(r"[MLQ] ?(-?[\d.]+) ", path[1])]

    (legend,) = re.findall(r'id="legend_1">\s*<g id="(patch_\d+)"', drawn)
    assert min(across(legend)) > max(across("patch_2")), "patch_2 is what the axes are drawn on"


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for page in PAGES for target in re.findall(r"(?:`|\$ )make ([a-z-]+)", page.read_text())}
    assert named
    assert named <= targets


def test_every_choice_of_tests_that_a_page_names_selects_one() -> None:
    tests = ROOT / "tests"
    named = [name for path in tests.rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())]
    named += [path.stem for path in tests.rglob("test_*.py")]
    chosen = {word for page in [*PAGES, ROOT / "Makefile"] for word in re.findall(r"ARGS='-k (\w+)", page.read_text())}
    assert chosen
    assert [word for word in sorted(chosen) if not any(word in name for name in named)] == []


def _links(page: Path) -> list[str]:
    return re.findall(r"\]\(((?:[\w./-]+)?(?:#[\w-]+)?)\)", page.read_text())


def _headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_python_file_that_the_code_names_by_its_path_exists() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    code = [name for name in tracked if name.endswith((".py", ".toml", ".md", "Makefile"))]
    missing = [
        f"{name} names {path}"
        for name in code
        for path in re.findall(r"`((?:\w+/)+\w+\.py)`", (ROOT / name).read_text())
        if not any((place / path).exists() for place in (ROOT, ROOT / "server", (ROOT / name).parent))
    ]
    assert not missing
