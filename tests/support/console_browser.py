"""Pages of the console in a real browser, and the pictures that are made of them.

`TEST_CONSOLE=docs` writes the pictures and tables of the docs, on a machine without other work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from playwright.sync_api import Browser, Page, expect, sync_playwright

_DOCS: Final = Path(__file__).parents[2] / "docs"
PATIENCE_MS: Final = 60_000
DESKTOP: Final = {"width": 1366, "height": 768}
PHONE: Final = {"width": 390, "height": 844}
expect.set_options(timeout=PATIENCE_MS)


@contextmanager
def running_chromium(program: str) -> Iterator[Browser]:
    """A browser without a window.

    Args:
        program: Its path.
    """
    with sync_playwright() as playwright:
        # Its own sandbox needs what a container has not; the pages are ours.
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(chromium: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A page of a browser that nobody used before; nothing of it may go wrong in silence."""
    context = chromium.new_context(base_url=url, viewport=options.pop("viewport", DESKTOP), **options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    yield page
    context.close()
    assert not wrong


def loaded(page: Page, path: str) -> None:
    """Opens a page, and waits until all its parts are there."""
    page.goto(path)
    expect(page.locator("main")).not_to_contain_text("Asking")


def picture(page: Page, name: str, directory: Path, *, whole: bool = True) -> None:
    """Takes a picture; into docs/ if the run was asked for that."""
    where = _DOCS if _for_docs() else directory
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=where / f"console-{name}.png", full_page=whole)


def into_docs(page: str, name: str, table: str) -> None:
    """Writes a table between its marks on a page of the docs, if the run was asked for that; prints it otherwise.

    Args:
        page: The file's name.
        name: Of the marks, which are comments.
        table: Lines of Markdown.
    """
    print(table)
    if not _for_docs():
        return
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = (_DOCS / page).read_text().partition(begin)
    _, ended, after = rest.partition(end)
    assert (found, ended) == (begin, end), f"{page} has a place for {name}"
    (_DOCS / page).write_text(f"{before}{begin}{table}{end}{after}")


def _for_docs() -> bool:
    return os.environ.get("TEST_CONSOLE") == "docs"
