"""What the contract says in words, against the code. Its rules are tested where they are kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import grpc
import pytest

from feature_cache import features

_ROOT: Final = Path(__file__).parents[2]
_CONTRACT: Final = (_ROOT / "proto/pretrade/decision/v1/decision.proto").read_text()
_CODE: Final = "\n".join(path.read_text() for path in sorted((_ROOT / "server").rglob("*.py")))
_NAMES: Final = sorted(set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", " ".join(re.findall(r"//(.*)", _CONTRACT)))))


def test_the_values_of_a_feature_vector_are_listed_in_their_order() -> None:
    assert re.findall(r"(\d+) `(\w+)`", _CONTRACT) == [(f"{n}", name) for n, name in enumerate(features.NAMES)]


@pytest.mark.parametrize("name", _NAMES)
def test_every_name_that_a_comment_gives_is_one_that_callers_meet(name: str) -> None:
    defined = re.search(rf"^\s+(?:\w+_)?{name} = \d+;", _CONTRACT, re.MULTILINE)  # an enum's value, with its prefix
    raised = f'"{name}"' in _CODE
    assert defined or raised or name in grpc.StatusCode.__members__ or name == "UPPER_SNAKE_CASE"
