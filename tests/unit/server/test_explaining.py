"""Explanations beside replies: never waited for beyond the call's deadline, and a reason where there is none."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading import Reading, Task
from server.explaining import Explaining, ExplainSettings

DECISION = pb.Decision(decision_id="0197-somebody", source=pb.SOURCE_PRIMARY)


@asynccontextmanager
async def explaining(path: Path, settings: ExplainSettings, counts: Counter[int]) -> AsyncIterator[Explaining]:
    """Asks a real process, of a journal that is not there."""
    task = Task(journal=path / "journal.db", database_url=f"sqlite:///{path / 'audit.db'}", model_store=None)
    async with Reading("explanations", task) as reading:
        yield Explaining(reading, settings, counts, asyncio.get_running_loop().time)


async def test_a_reply_does_not_wait_beyond_its_deadline(tmp_path: Path) -> None:
    clock = asyncio.get_running_loop().time
    counts: Counter[int] = Counter()
    # The process takes longer to start than the reply may wait.
    async with explaining(tmp_path, ExplainSettings(patience_seconds=10, reply_reserve_seconds=1), counts) as asked:
        deadline = clock() + 1.01
        answer = await asked.explanation(DECISION, deadline)
        assert clock() < deadline
        assert (answer.status, answer.decision_id) == (pb.EXPLANATION_STATUS_LATE, DECISION.decision_id)
        passed = await asked.explanation(DECISION, clock() - 1)
        assert passed.status == pb.EXPLANATION_STATUS_LATE
    async with explaining(tmp_path, ExplainSettings(patience_seconds=0.01), counts) as asked:
        impatient = await asked.explanation(DECISION, None)
        assert impatient.status == pb.EXPLANATION_STATUS_LATE
    assert counts == {pb.EXPLANATION_STATUS_LATE: 3}


async def test_what_cannot_be_explained_says_why(tmp_path: Path) -> None:
    counts: Counter[int] = Counter()
    async with explaining(tmp_path, ExplainSettings(patience_seconds=10), counts) as asked:
        # The process may take longer to start than anybody may be patient.
        while (answer := await asked.explanation(DECISION, None)).status == pb.EXPLANATION_STATUS_LATE:
            pass
        assert answer.status == pb.EXPLANATION_STATUS_UNAVAILABLE
        assert answer.message
        by_rules = await asked.explanation(pb.Decision(source=pb.SOURCE_RULES), None)
        assert by_rules.status == pb.EXPLANATION_STATUS_NO_MODEL
        assert "RULES" in by_rules.message
    del counts[pb.EXPLANATION_STATUS_LATE]
    assert counts == {pb.EXPLANATION_STATUS_UNAVAILABLE: 1, pb.EXPLANATION_STATUS_NO_MODEL: 1}
