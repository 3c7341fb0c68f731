"""What the processes that read the audit do for a question, and what they leave alone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from pretrade.wire.reading import reading_pb2
from server.audit.reading.reading import Task
from server.errors import NotReplayableError
from server.journal.journal_file import JournalFile, JournalReader
from server.rpc.call import Call
from server.rpc.reading import ReadingServicer


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
