"""Control files, and what is steered, for tests that need no whole server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from server.control.file import ControlFile
from server.control.model import TRADING_STATE, UNDECIDED, Change, Control, Kept
from server.inference.breaker import Breaker


def that_trades(path: Path) -> ControlFile:
    """The control file of a server whose trading state somebody has set to ACTIVE."""
    change = Change(
        id="first", subject=TRADING_STATE, value="ACTIVE", lifts=(UNDECIDED.id,), author="test", reason="test"
    )
    file = ControlFile(path)
    file.change(lambda found: found or Kept(control=Control().with_change(change)))
    return file


def role_of(name: str, breaker: Breaker) -> Any:
    """A role whose one replica is nothing but a breaker."""
    replica = SimpleNamespace(name=name, names=(name,), breaker=breaker, several=False, on_join=lambda listener: None)
    replica.replicas = (replica,)
    return replica
