"""Explanations beside replies: never waited for beyond the call's deadline, and a reason where there is none."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.virtual_time import VirtualTimeLoop

from pretrade.audit.v1 import audit_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.wire.reading import reading_pb2
from server.audit.reading.explaining import Explaining, ExplainSettings
from server.audit.reading.reading import Question, Reading, ReadingProcess, Task
from server.errors import (
    AuditBusyError,
    AuditError,
    AuditUnavailableError,
    NotReplayableError,
    UnknownDecisionError,
)

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
        self.refused: set[str] = set()

    async def ask(self, question: Question, request: bytes) -> bytes:
        if question is Question.WARM_UP:
            about = reading_pb2.WarmUpRequest.FromString(request).model_version
        else:
            about = audit_pb2.ExplainDecisionRequest.FromString(request).decision_id
        self.questions.append((question, about))
        if about in self.refused:
            raise NotReplayableError("no such archive")
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


def in_virtual_time(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    """Runs a test that would wait for minutes."""

    @functools.wraps(test)
    def run() -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(test())

    del run.__wrapped__  # pytest would take it for a coroutine
    return run


@asynccontextmanager
async def kept_warm(
    reading: Reading, versions: Callable[[], Sequence[str]], **settings: float
) -> AsyncIterator[Explaining]:
    asked = Explaining(reading, ExplainSettings(**settings), Counter(), asyncio.get_running_loop().time, versions)
    task = asyncio.create_task(asked.keep_warm())
    try:
        yield asked
    finally:
        task.cancel()


@in_virtual_time
async def test_the_model_that_decides_is_loaded_before_anybody_asks_and_so_is_the_next_one() -> None:
    reading, version = Scripted(), ""
    async with kept_warm(reading, lambda: (version,) if version else ()) as asked:
        await asyncio.sleep(3)
        assert (reading.questions, asked.warming_up) == ([], False), "nobody knows yet which one decides"
        version = "aa" * 8
        assert (asked.warming_up, asked.problem) == (True, "")
        await asyncio.sleep(3)
        assert (asked.warming_up, asked.problem) == (True, "")
        reading.answer.set_result(b"")
        await asyncio.sleep(3)
        assert (asked.warming_up, asked.problem) == (False, "")
        version = "bb" * 8
        assert (asked.warming_up, asked.problem) == (False, ""), "the server serves by now"
        await asyncio.sleep(3)
        assert reading.questions == [(Question.WARM_UP, "aa" * 8), (Question.WARM_UP, "bb" * 8)]


@in_virtual_time
async def test_a_model_is_loaded_again_into_a_new_process() -> None:
    reading = Scripted()
    reading.answer.set_result(b"")
    async with kept_warm(reading, lambda: ("aa" * 8,)):
        await asyncio.sleep(3)
        assert len(reading.questions) == 1
        reading._process.ended += 1
        await asyncio.sleep(3)
        assert len(reading.questions) == 2


@in_virtual_time
async def test_a_model_that_cannot_be_loaded_holds_the_start_up_only_once() -> None:
    reading = Scripted()
    async with kept_warm(reading, lambda: ("aa" * 8,)) as asked:
        await asyncio.sleep(14)
        assert asked.warming_up
        await asyncio.sleep(2)
        assert (asked.warming_up, asked.problem) == (False, f"version {'aa' * 8} is not loaded: it takes too long")
        reading.answer.set_exception(NotReplayableError("no such archive"))
        await asyncio.sleep(60)
        assert asked.problem.endswith("no such archive")
        assert len(reading.questions) == 2, "not again and again"


@in_virtual_time
async def test_the_models_of_all_orders_are_loaded_and_the_first_alone_holds_the_start_up() -> None:
    reading, versions = Scripted(), ["aa" * 8, "bb" * 8]
    async with kept_warm(reading, lambda: versions) as asked:
        await asyncio.sleep(3)
        assert (asked.warming_up, reading.questions) == (True, [(Question.WARM_UP, "aa" * 8)])
        reading.answer.set_result(b"")
        await asyncio.sleep(3)
        assert (asked.warming_up, reading.questions[1:]) == (False, [(Question.WARM_UP, "bb" * 8)])
        versions.append("cc" * 8)
        await asyncio.sleep(3)
        assert reading.questions[2:] == [(Question.WARM_UP, "cc" * 8)], "those that are loaded stay as they are"
        reading._process.ended += 1
        await asyncio.sleep(3)
        assert [about for _, about in reading.questions[3:]] == versions, "a new process has loaded none"


@in_virtual_time
async def test_a_model_that_cannot_be_loaded_keeps_no_other_from_it_and_is_forgotten_with_its_orders() -> None:
    reading, versions = Scripted(), ["aa" * 8, "bb" * 8]
    reading.answer.set_result(b"")
    reading.refused.add("aa" * 8)
    async with kept_warm(reading, lambda: versions) as asked:
        await asyncio.sleep(3)
        assert [about for _, about in reading.questions] == versions
        assert asked.problem == f"version {'aa' * 8} is not loaded: no such archive"
        reading.refused.clear()
        await asyncio.sleep(60)
        assert [about for _, about in reading.questions[2:]] == ["aa" * 8], "tried again"
        assert asked.problem == ""
        reading.refused.add("cc" * 8)
        versions[:] = ["cc" * 8]
        await asyncio.sleep(3)
        assert asked.problem == f"version {'cc' * 8} is not loaded: no such archive"
        versions[:] = ["bb" * 8]
        await asyncio.sleep(3)
        assert asked.problem == ""


@in_virtual_time
async def test_nothing_is_loaded_where_no_reply_waits_for_an_explanation() -> None:
    reading = Scripted()
    async with kept_warm(reading, lambda: ("aa" * 8,), patience_seconds=0) as asked:
        await asyncio.sleep(3)
        assert (reading.questions, asked.warming_up) == ([], False)
