"""What keeps a stack up."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from local.stack.errors import PartFailedError
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from local.stack.up import keep_up


class OnePart:
    """A stack whose part ended, and does not come up again in so many attempts."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.attempts = 0
        self.processes: dict[str, Any] = {}

    def ended(self) -> list[str]:
        return ["secondary"]

    def __getitem__(self, part: str) -> Any:
        return SimpleNamespace(ending="was ended by SIGKILL")

    def restart(self, part: str) -> None:
        self.attempts += 1
        if self.attempts <= self.failures:
            raise PartFailedError(part, "not ready", Path("secondary.log"), "")


def kept_up(stack: OnePart) -> str:
    console, rounds = Console(file=io.StringIO(), width=200), iter((False, True))
    keep_up(cast("Stack", stack), LocalSettings(), console, lambda: next(rounds))
    return cast("io.StringIO", console.file).getvalue()


def test_a_part_that_is_not_ready_in_time_is_started_once_more() -> None:
    stack = OnePart(failures=1)
    said = kept_up(stack)
    assert stack.attempts == 2
    assert "secondary was ended by SIGKILL; starting it again" in said
    assert "secondary not ready; its log is secondary.log; trying once more" in said


def test_one_that_does_not_come_up_then_ends_the_stack() -> None:
    with pytest.raises(PartFailedError):
        kept_up(OnePart(failures=2))
