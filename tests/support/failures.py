"""Writes `docs/failures.md` from the `fault` marks of the tests (`make pages`); a test checks that it is current."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parents[1]
PAGE: Final = TESTS.parent / "docs" / "failures.md"

_INTRODUCTION: Final = """\
# When things break

Read this when you want to know what callers see when a part fails, and how we know. Each row is a
test that causes the failure, and checks what callers receive, what the audit holds and what the
metrics count. `make faults` runs those in `tests/faults` against real processes, and prints the
same table with what it measured.

Words in capitals, such as SECONDARY, are values of the contract
([decision.proto](../proto/pretrade/decision/v1/decision.proto)). *Invariants* are the eight rules
that [invariants.py](../tests/support/invariants.py) checks after a run, for example: every reply
that a caller received is in the audit exactly once.

*By each way in* means single calls, batches and streams. It is not shown of single calls on the edge
`grpcio`: beside other work, some calls of a dense burst passed their deadline there when the primary
was killed or the journal was full. Why is not known.

<!-- Made by `make pages` from the `fault` marks of the tests. -->
"""

_SECTIONS: Final = (
    ("Model replicas and the fallback chain", ("A",)),
    ("Redis and the control state", ("B",)),
    ("Market data and feature workers", ("C",)),
    ("Audit", ("D1", "D2", "D3", "D4", "D6", "D7")),
    ("Callers", ("D5", "E")),
    ("Server processes, regions and the machine", ("F1", "F2", "F3", "F7", "G")),
    ("Configuration, certificates and access", ("F4", "F5", "F6")),
    ("Traces, logs and metrics", ("F8",)),
    ("Several faults at once", ("Z",)),
)
"""Headings, and the identifiers below each: a whole letter or single ones."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the page."""

    identifier: str
    fault: str
    expected: str
    test: str
    path: Path


def faults() -> list[Fault]:
    """Every marked test, in the order of the identifiers.

    Raises:
        ValueError: A mark does not hold three literal texts.
    """
    found = [fault for path in sorted(TESTS.rglob("test_*.py")) for fault in _marked(path)]
    return sorted(found, key=lambda each: (each.identifier[0], int(each.identifier[1:]), str(each.path)))


def page() -> str:
    """The page as Markdown.

    Raises:
        ValueError: As `faults`, or an identifier belongs below no heading.
    """
    rows = faults()
    lines = [_INTRODUCTION]
    shown = 0
    for heading, identifiers in _SECTIONS:
        below = [row for row in rows if row.identifier in identifiers or row.identifier[0] in identifiers]
        shown += len(below)
        lines += [f"## {heading}", "", "| what breaks | what you see | test |", "|---|---|---|"]
        lines += [f"| {row.fault} | {row.expected} | [{row.identifier}]({_link(row)}) |" for row in below]
        lines.append("")
    if shown != len(rows):
        raise ValueError("a fault belongs below exactly one heading of _SECTIONS")
    return "\n".join(lines)


def _link(row: Fault) -> str:
    return f"../{row.path.relative_to(TESTS.parent).as_posix()}"


def _marked(path: Path) -> Iterator[Fault]:
    source = path.read_text()
    if "mark.fault(" not in source:
        return
    for test in ast.walk(ast.parse(source)):
        if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in test.decorator_list:
                for mark in ast.walk(decorator):
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                        identifier, fault, expected = map(ast.literal_eval, mark.args)
                        yield Fault(identifier, fault, expected, test.name, path)


if __name__ == "__main__":
    PAGE.write_text(page())
