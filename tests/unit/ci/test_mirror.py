"""A unit test is where its module would be looked for: `tests/unit` has the folders and names of the code."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[3]
UNIT: Final = ROOT / "tests" / "unit"
ELSEWHERE: Final = {
    "client": "client/pretrade/client",
    "console": "client/pretrade/console",
    "support": "tests/support",
    "ci": ".ci",
}
"""Folders of `tests/unit` that are named otherwise than what they test."""
EXCEPTIONS: Final = {
    "ci/test_make_scripts.py": "`.ci/setup` and `.ci/clean`, in one repository made for both",
    "ci/test_mirror.py": "this test",
    "ci/test_pages.py": "README and the pages in docs/",
    "fallback/test_guards_of_blocks.py": "the guards, on blocks and on single orders, which promise the same",
    "feature_cache/ta1/test_cost.py": "the whole set: what its indicators cost together",
    "server/decision/test_columns_or_alone.py": "the decision path, in columns and order by order",
    "torchserve/brought/test_on_other_servers.py": "what of a brought model goes to Triton and MLServer",
    "server/audit/reading/test_lookups_by_range.py": "look-ups in journals: the same with and without ranges",
    "client/test_clients.py": "the client and the one for asyncio, which promise the same",
    "client/test_package.py": "the package itself: what an import of it loads",
    "server/control/test_register.py": "the control state of several servers, while everything around them fails",
    "server/inference/test_overload.py": "admission, batcher and champion together",
    "server/test_secrets.py": "the settings of every program",
}
"""Tests of no single module or folder, and what they test."""


def mirrors(test: Path) -> bool:
    """True when a test is named for a module, a folder or a script, and in the place of that."""
    folder, *below = test.relative_to(UNIT).parent.parts
    place = (ROOT / ELSEWHERE.get(folder, folder)).joinpath(*below)
    name = test.stem.removeprefix("test_")
    return any((place / each).exists() for each in (f"{name}.py", f"{name}_c.pyx", name, name.replace("_", "-")))


def test_every_unit_test_is_named_for_what_it_tests() -> None:
    tests = {str(test.relative_to(UNIT)): test for test in UNIT.rglob("test_*.py")}
    assert EXCEPTIONS.keys() <= tests.keys()
    strays = {name for name, test in tests.items() if name not in EXCEPTIONS and not mirrors(test)}
    assert not strays


def test_no_exception_is_one_without_need() -> None:
    assert not [name for name in EXCEPTIONS if mirrors(UNIT / name)]
