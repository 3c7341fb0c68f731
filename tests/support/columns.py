"""Orders in columns, for tests of what is done with them and not of who waits."""

from __future__ import annotations

from typing import Any

from fallback.block import Block


class Columns(Block):
    """A block of which nobody waits for a result, and every order has one."""

    def complete(self) -> None:
        """All are there."""

    def is_left(self) -> bool:
        """False."""
        return False

    def is_gone(self, place: int) -> bool:
        """False."""
        return False

    def put_failure(self, place: int, result: Any) -> None:
        """Fails: there is none."""
        raise AssertionError("there is none")
