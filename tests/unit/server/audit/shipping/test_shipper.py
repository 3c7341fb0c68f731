"""What the server knows of its shipping."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from support.cases import Clock

from server.audit.shipping.shipper import Shipper
from server.audit.shipping.shipping import Progress, ShippingSettings
from server.journal.journal import Journal


def shipper_of(journal: Any, clock: Clock) -> Shipper:
    return Shipper(cast("Journal", journal), "sqlite:///audit.db", ShippingSettings(retained_rows=2_000), clock=clock)


def journal_in(path: Path, **more: Any) -> Any:
    trimmed: list[int] = []
    return SimpleNamespace(
        **{"position": 0, "full": False, "bytes": 0, "limit_bytes": 100} | more,
        settings=SimpleNamespace(path=path / "journal.db"),
        machine=SimpleNamespace(host_name=lambda: "here"),
        trim=trimmed.append,
        trimmed=trimmed,
    )


def test_what_was_shipped_stays_only_while_there_is_room(tmp_path: Path) -> None:
    journal = journal_in(tmp_path, position=9_000, bytes=50)
    shipper = shipper_of(journal, Clock())
    shipper._sql._note(Progress(position=5_000, error=""))
    assert journal.trimmed == [3_000]
    journal.bytes = 51
    shipper._sql._note(Progress(position=5_001, error=""))
    assert journal.trimmed == [3_000, 5_001], "before it is full, so that it is never full of what is in SQL"


def test_a_database_that_takes_connections_and_says_nothing_is_a_fault_after_ten_seconds(tmp_path: Path) -> None:
    journal, clock = journal_in(tmp_path), Clock()
    shipper = shipper_of(journal, clock)

    def after(seconds: float) -> str:
        clock.now += seconds
        return shipper.problem

    assert after(60) == "", "there was nothing to ship"
    journal.position = 5
    assert after(9) == ""
    assert after(1) == "the database does not answer: entries have waited for more than 10 s"
    shipper._sql._note(Progress(position=3, error=""))
    assert [after(1), after(5)] == ["", ""], "it is behind, and moves"
    shipper._sql._note(Progress(position=3, error="connection refused"))
    assert after(0) == "connection refused"
