"""Explanations beside replies: never waited for beyond the call's deadline, and a reason where there is none."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from pretrade.audit.v1 import audit_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.explaining import Explaining, ExplainSettings
from server.audit.reading.reading import Question, Reading, ReadingProcess, Task
from server.errors import AuditBusyError, AuditError, AuditUnavailableError, UnknownDecisionError

DECISION = pb.Decision(decision_id="0197-somebody", source=pb.SOURCE_PRIMARY)
FOUND = audit_pb2.ExplainDecisionResponse(explanation=pb.Explanation(status=pb.EXPLANATION_STATUS_READY, base=0.25))


class Scripted(Reading):
    """Answers as told, in the place of a process; until told it does not answer."""

    def __init__(self) -> None:
        task = Task(journal=Path("unused"), database_url="sqlite://", model_store=None)
        super().__init__("explanations", ReadingProcess("models", task))
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.questions: list[tuple[Question, str]] = []
        self.answered = 0

    async def ask(self, question: Question, request: bytes) -> bytes:
        self.questions.append((question, audit_pb2.ExplainDecisionRequest.FromString(request).decision_id))
        answer = await asyncio.shield(self.answer)
        self.answered += 1
        return answer


def explaining(reading: Reading, counts: Counter[int], **settings: float) -> Explaining:
    return Explaining(reading, ExplainSettings(**settings), counts, asyncio.get_running_loop().time)


async def test_a_decision_is_explained_by_the_process_that_reads_the_audit() -> None:
    counts: Counter[int] = Counter()
    reading = Scripted()
    reading.answer.set_result(FOUND.SerializeToString())
    assert await explaining(reading, counts).explanation(DECISION, None) == FOUND.explanation
    assert reading.questions == [(Question.EXPLAIN, DECISION.decision_id)]
    assert counts == {pb.EXPLANATION_STATUS_READY: 1}


async def test_a_reply_does_not_wait_beyond_its_deadline() -> None:
    clock = asyncio.get_running_loop().time
    counts: Counter[int] = Counter()
    asked = explaining(Scripted(), counts, patience_seconds=10, reply_reserve_seconds=1)
    deadline = clock() + 1.01
    answer = await asked.explanation(DECISION, deadline)
    assert clock() < deadline
    assert (answer.status, answer.decision_id) == (pb.EXPLANATION_STATUS_LATE, DECISION.decision_id)
    passed = await asked.explanation(DECISION, clock() - 1)
    assert passed.status == pb.EXPLANATION_STATUS_LATE
    impatient = await explaining(Scripted(), counts, patience_seconds=0.01).explanation(DECISION, None)
    assert impatient.status == pb.EXPLANATION_STATUS_LATE
    assert counts == {pb.EXPLANATION_STATUS_LATE: 3}


@pytest.mark.parametrize(
    "error", [UnknownDecisionError("no such decision"), AuditBusyError("32 wait"), AuditUnavailableError("ended")]
)
async def test_what_cannot_be_explained_says_why(error: AuditError) -> None:
    counts: Counter[int] = Counter()
    reading = Scripted()
    reading.answer.set_exception(error)
    asked = explaining(reading, counts)
    answer = await asked.explanation(DECISION, None)
    assert (answer.status, answer.message) == (pb.EXPLANATION_STATUS_UNAVAILABLE, str(error))
    assert counts == {pb.EXPLANATION_STATUS_UNAVAILABLE: 1}


async def test_an_answer_without_a_model_asks_no_process() -> None:
    counts: Counter[int] = Counter()
    reading = Scripted()
    by_rules = await explaining(reading, counts).explanation(pb.Decision(source=pb.SOURCE_RULES), None)
    assert by_rules.status == pb.EXPLANATION_STATUS_NO_MODEL
    assert "RULES" in by_rules.message
    assert (reading.questions, counts) == ([], {pb.EXPLANATION_STATUS_NO_MODEL: 1})


async def test_a_question_whose_reply_had_to_leave_is_still_answered_since_it_may_be_what_loads_the_model() -> None:
    reading = Scripted()
    asked = explaining(reading, Counter(), patience_seconds=0.01)
    late = asyncio.create_task(asked.explanation(DECISION, None))
    assert (await late).status == pb.EXPLANATION_STATUS_LATE
    left = asyncio.create_task(asked.explanation(DECISION, None))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    reading.answer.set_result(FOUND.SerializeToString())
    ready = await explaining(reading, Counter()).explanation(DECISION, None)
    assert (ready.status, reading.answered) == (pb.EXPLANATION_STATUS_READY, 3)
