"""What the processes that read the audit do for a question, and what they leave alone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from pretrade.wire.reading import reading_pb2
from server.audit.reading.reading import Task
from server.audit.store.store import Store
from server.errors import NotReplayableError
from server.journal.journal_file import JournalFile, JournalReader
from server.rpc.call import Call
from server.rpc.reading import ReadingServicer
from server.timing.pace import Pace


async def test_warming_up_a_model_reads_no_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After hours without a database a journal holds millions of rows, and a server that starts waits for this."""
    path = tmp_path / "journal.db"
    with closing(JournalFile(path, sync_commits=False)) as journal:
        journal.append([b"a row"])
    looked_at: list[JournalReader] = []
    rows_after = JournalReader.rows_after

    def counted(reader: JournalReader, position: int, limit: int) -> list[object]:
        looked_at.append(reader)
        return list(rows_after(reader, position, limit))

    monkeypatch.setattr(JournalReader, "rows_after", counted)
    task = Task(journal=path, database_url=f"sqlite:///{tmp_path / 'audit.db'}", model_store=tmp_path)
    request = reading_pb2.WarmUpRequest(model_version="0123456789abcdef")
    with pytest.raises(NotReplayableError, match="no archive"):
        await ReadingServicer(task).WarmUp(request, Call(None, ()))
    assert looked_at == []


async def test_nobody_waits_for_a_comparison_so_it_rests_between_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that, a second of full work every minute cost a busy server orders."""
    rests = list[Pace]()

    def rest(pace: Pace) -> None:
        rests.append(pace)

    monkeypatch.setattr(Pace, "rest", rest)
    path = tmp_path / "journal.db"
    with closing(JournalFile(path, sync_commits=False)):
        task = Task(journal=path, database_url=f"sqlite:///{tmp_path / 'audit.db'}", model_store=tmp_path)
        with closing(Store(task.database_url)) as store:
            store.migrate()
        request = reading_pb2.CompareDriftRequest(window_seconds=900, max_decisions=2_000)
        status = await ReadingServicer(task).CompareDrift(request, Call(None, ()))
    assert status.problem == "no decision was scored by a model"
    assert len(rests) == 120
    assert len(set(map(id, rests))) == 1
