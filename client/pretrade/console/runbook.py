"""The runbook as a page: what an alert or a fault means, and what to do, where on-call looks anyway."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import Final

from markdown_it import MarkdownIt
from markdown_it.token import Token

_PLACES: Final = (Path(__file__).with_name("runbook.md"), Path(__file__).parents[3] / "docs" / "runbook.md")
"""In an installed package, and in a clone of the repository."""
PATH: Final = "/runbook"


def section(url: str) -> str:
    """Where a section of the runbook is in the console, by its address in the repository; empty for another page."""
    document, _, anchor = url.partition("#")
    return f"{PATH}#{anchor}" if document == "docs/runbook.md" else ""


@functools.cache
def body() -> str:
    """The runbook in HTML.

    Raises:
        OSError: It is not there.
    """
    found = next((place for place in _PLACES if place.is_file()), _PLACES[0])
    return rendered(found.read_text(encoding="utf-8"))


def rendered(text: str) -> str:
    """A page of the docs in HTML: each section has its anchor, and links lead to sections and other sites alone."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    for token, following in itertools.pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", anchor_of(following.content))
    for token in tokens:
        if token.children is not None:
            token.children = _reachable(token.children)
    html: str = markdown.renderer.render(tokens, markdown.options, {})
    return html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")


def anchor_of(title: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _reachable(tokens: list[Token]) -> list[Token]:
    """Without links to other pages of the docs, which the console does not have; their text stays."""
    kept: list[Token] = []
    is_inside = False
    for token in tokens:
        if token.type == "link_open":
            is_inside = not str(token.attrGet("href")).startswith(("#", "https://"))
            if is_inside:
                continue
        elif token.type == "link_close" and is_inside:
            is_inside = False
            continue
        kept.append(token)
    return kept
