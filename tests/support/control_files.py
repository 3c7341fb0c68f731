"""Control files for tests whose subject is not the control state."""

from __future__ import annotations

from pathlib import Path

from server.control.file import ControlFile
from server.control.model import TRADING_STATE, UNDECIDED, Change, Control, Kept


def that_trades(path: Path) -> ControlFile:
    """The control file of a server whose trading state somebody has set to ACTIVE."""
    change = Change(
        id="first", subject=TRADING_STATE, value="ACTIVE", lifts=(UNDECIDED.id,), author="test", reason="test"
    )
    file = ControlFile(path)
    file.change(lambda found: found or Kept(control=Control().with_change(change)))
    return file
