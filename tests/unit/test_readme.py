"""The README holds what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from server.reference import with_reasons

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_its_reason_codes_are_current() -> None:
    assert with_reasons(README) == README, "run `python -m server.reference`"


def test_every_file_it_links_to_exists() -> None:
    missing = [link for link in re.findall(r"\]\(([\w/.-]+)\)", README) if not (ROOT / link).exists()]
    assert not missing


def test_every_test_it_names_exists() -> None:
    named = re.findall(r"\[(test_\w+)…\]\(([\w/.-]+)\)", README)
    assert named
    missing = [name for name, path in named if f"def {name}" not in (ROOT / path).read_text()]
    assert not missing


def test_it_stays_readable() -> None:
    assert len(README.splitlines()) < 300
