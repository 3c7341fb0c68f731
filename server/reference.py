"""The settings and reason codes for people to read, made from the code that defines them.

`python -m server.reference` writes the reason codes into the README between their markers; a test holds the README
against them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pydantic import BaseModel, SecretStr

from pretrade.decision.v1 import decision_pb2 as pb
from server.settings import PREFIX, Settings

_MARKERS: Final = re.compile("<!-- begin reasons -->.*?<!-- end reasons -->", re.DOTALL)
_PROTO: Final = Path(__file__).parents[1] / "proto/pretrade/decision/v1/decision.proto"


def settings() -> Iterator[tuple[str, str, str]]:
    """(variable, default, description) of every setting."""
    yield from _fields(Settings, PREFIX)


def reasons_table() -> str:
    """Every reason code as a Markdown table, with the contract's own comment."""
    comments = {name: text for text, name in re.findall(r"// (.+)\n  (REASON_CODE_\w+) =", _PROTO.read_text())}
    names = (value.name for value in pb.ReasonCode.DESCRIPTOR.values if value.number)
    rows = (f"| `{name.removeprefix('REASON_CODE_')}` | {comments[name]} |" for name in names)
    return "\n".join(("| reason | meaning |", "|---|---|", *rows))


def with_reasons(document: str) -> str:
    """The document with its table of reason codes brought up to date.

    Raises:
        ValueError: The table's markers are missing.
    """
    if not _MARKERS.search(document):
        raise ValueError("the markers of the reason codes are missing")
    head, tail = _MARKERS.split(document, maxsplit=1)
    return f"{head}<!-- begin reasons -->\n{reasons_table()}\n<!-- end reasons -->{tail}"


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        default = field.default
        if isinstance(default, BaseModel):
            yield from _fields(type(default), f"{variable}__")
        else:
            shown = default.get_secret_value() if isinstance(default, SecretStr) else default
            text = " ".join((field.description or "").split())
            yield variable, _shown(shown), text


def _shown(default: object) -> str:
    match default:
        case None:
            return "unset"
        case str():
            return default
        case tuple():
            return ", ".join(map(str, default))
        case _:
            return str(getattr(default, "value", default))


if __name__ == "__main__":
    readme = Path(sys.argv[1] if sys.argv[1:] else "README.md")
    readme.write_text(with_reasons(readme.read_text()))
