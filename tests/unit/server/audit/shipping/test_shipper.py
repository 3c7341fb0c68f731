"""What the server knows of its shipping."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from support.cases import Clock

from server.audit.shipping.shipper import Shipper
from server.audit.shipping.shipping import Progress, ShippingSettings
from server.journal.journal import Journal


def test_a_database_that_takes_connections_and_says_nothing_is_a_fault_after_ten_seconds(tmp_path: Path) -> None:
    journal: Any = SimpleNamespace(
        position=0,
        full=False,
        settings=SimpleNamespace(path=tmp_path / "journal.db"),
        machine=SimpleNamespace(host_name=lambda: "here"),
        trim=lambda _: None,
    )
    clock = Clock()
    shipper = Shipper(cast("Journal", journal), "sqlite:///audit.db", ShippingSettings(), clock=clock)

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
