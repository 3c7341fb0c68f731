"""What the source says of a setting is found where it stands, of the class and of those that it extends."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import ClassVar

import pytest
from pydantic import BaseModel, Field

from feature_cache.described import descriptions
from server.settings import Settings


class Wide(BaseModel):
    width: int = 1
    """In steps.

    Never negative.
    """
    other: int = 2
    constant: ClassVar[int] = 3
    """No field of the class."""


class Deep(Wide):
    other: int = Field(default=3)
    """Said by the class that extends it."""
    depth: int = 4
    # A comment is no description.


def test_each_field_has_the_string_below_it() -> None:
    assert descriptions(Wide) == {"width": "In steps.\n\nNever negative.", "other": ""}


def test_a_class_has_what_it_extends_and_says_itself() -> None:
    assert descriptions(Deep) == {
        "width": "In steps.\n\nNever negative.",
        "other": "Said by the class that extends it.",
        "depth": "",
    }


def test_where_only_bytecode_is_installed_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def getsource(model: type) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", getsource)
    assert descriptions.__wrapped__(Deep) == {"width": "", "other": "", "depth": ""}


def test_every_setting_of_a_server_is_described() -> None:
    sections = [Settings, *(type(field.default) for field in Settings.model_fields.values())]
    undescribed = [
        f"{section.__name__}.{name}"
        for section in sections
        if isinstance(section, type) and issubclass(section, BaseModel)
        for name, field in section.model_fields.items()
        if not isinstance(field.default, BaseModel) and not descriptions(section)[name]
    ]
    assert not undescribed


def test_a_start_reads_no_source() -> None:
    program = "import inspect, sys\ninspect.findsource = None\nfrom server.__main__ import main\nsys.exit(main())"
    environment = os.environ | {"PRETRADE_BUDGET__CAP_SECONDS": "-1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("PRETRADE_BUDGET__CAP_SECONDS: ")
