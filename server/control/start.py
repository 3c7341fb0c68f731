"""Changes to the control state before the first process of a server starts."""

from __future__ import annotations

from collections.abc import Callable

from server.control.file import ControlFile
from server.control.model import STRICTNESS, TRADING_STATE, Change, Kept
from server.control.recorded import record
from server.control.records import describe, to_json
from server.control.state import ControlSettings
from server.control.subjects import Subject, one_of


def halt_at_start(
    settings: ControlSettings, file: ControlFile, new_id: Callable[[], str], wall_clock_ns: Callable[[], int]
) -> None:
    """Makes a server halted that is to start so; called once for all its processes, before the first.

    Raises:
        OSError: It cannot be written.
    """
    if not settings.halted:
        return
    halt_id, author, reason = new_id(), "server", "its settings say to start halted"

    def halted(found: Kept | None) -> Kept:
        kept = found or Kept()
        before = kept.control.with_changes(kept.pending)
        earlier = [
            one.id for one in before.trading.restrictions.values() if (one.author, one.reason) == (author, reason)
        ]
        change = Change(
            id=halt_id, subject=TRADING_STATE, value="HALTED", lifts=tuple(earlier), author=author, reason=reason
        )
        subject = Subject("HALTED", one_of(*STRICTNESS), lambda *_: None)
        message = describe({TRADING_STATE: subject}, before, before.with_change(change), change, lambda _: False)
        message.changed_at.FromNanoseconds(wall_clock_ns())
        change = change.model_copy(update={"record": to_json(record(message))})
        if settings.store == "redis":
            return kept.merged(Kept(pending=(change,)))
        return Kept(control=before.with_change(change))

    file.change(halted)
