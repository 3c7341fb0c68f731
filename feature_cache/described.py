"""What our source says of a setting: the string below its field.

pydantic reads these itself if it is told to (`use_attribute_docstrings`), but whenever a class is made: each start of a
server would read and parse the source of some fifty classes, for a seventh of the time that its imports take. Only
people want them, for `--help`, a refusal and the pages of docs/; so they are read here, when one is asked for.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise
from typing import Final

from pydantic import BaseModel

_NOT_OURS: Final = ("pydantic", "pydantic_settings")


@cache
def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """What the source says of each field of a class of settings, by the field's name.

    That is "" of a field with nothing below it, and of every field where only bytecode is installed.
    """
    found: dict[str, str] = {}
    for ancestor in reversed(model.__mro__):
        if "__pydantic_fields__" in vars(ancestor) and ancestor.__module__.split(".")[0] not in _NOT_OURS:
            found |= _read(ancestor)
    return {name: found.get(name, "") for name in model.model_fields}


def _read(model: type) -> dict[str, str]:
    try:
        source = inspect.getsource(model)
    except OSError:
        return {}
    (written,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(written, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(below.value.value)
        for field, below in pairwise(written.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
