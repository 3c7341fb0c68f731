"""What the journal says of a reply is what its caller heard, whatever happens between the disk and the transport."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from support.request_path import (
    PATIENT,
    RequestPath,
    entries,
    left_by_kill,
    order,
    request_path,
    statuses,
)
from support.waiting import until

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.query import AuditQuery
from server.decision.record import Decided
from server.decision.replies import Replies
from server.errors import DeadlineError, InternalError, JournalUnwritableError
from server.journal import reply_status
from server.journal.journal import Durability, Journal, JournalSettings, settle_what_was_left
from server.journal.journal_file import JournalReader, Row
from server.journal.reply_status import (
    AS_DECIDED,
    REPEATED,
    REPLIED,
    UNSETTLED,
    WITHDRAWN,
    Reply,
    Statuses,
    notes_of,
    reply_of,
    unknown_replies,
)

CANCELLED = "reply_unconfirmed:cancelled"
DEADLINE = "reply_unconfirmed:deadline"
UNSENT = "reply_unconfirmed:unsent"


@contextmanager
def locked(journal: Journal) -> Iterator[None]:
    """Somebody holds the file's write lock: commits wait for a quarter of a second and then fail."""
    with closing(sqlite3.connect(journal.settings.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")


async def unary(p: RequestPath, message: pb.Order, timeout_seconds: float | None = None) -> Any:
    """The reply to a call; what becomes of it is for the test to say."""
    return await p.servicer.Decide(pb.DecideRequest(order=message), p.call(timeout_seconds))


def result_in(answer: Any) -> pb.OrderResult:
    """The result in an answer of a stream."""
    return pb.DecideStreamResponse.FromString(answer.wire).result


async def batch_of(p: RequestPath, orders: list[pb.Order], timeout_seconds: float | None = None) -> Any:
    return await p.servicer.DecideBatch(pb.DecideBatchRequest(orders=orders), p.call(timeout_seconds))


async def test_what_is_heard_needs_no_note(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        await p.decide(order("one"))
        p.servicer.sent(await batch_of(p, [order(f"b{number}") for number in range(3)]))
        answers = p.stream(order("s"))
        await anext(answers)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(answers)  # asked for the next one: the first was sent
        assert (p.replies.owed, p.replies.waiting) == (0, 0)
    assert statuses(tmp_path) == dict.fromkeys(("one", "b0", "b1", "b2", "s"), REPLIED)
    assert len(entries(tmp_path)) == 5


async def test_a_unary_reply_that_is_not_sent_is_noted(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        p.servicer.not_sent(await unary(p, order("one")))
        assert p.metrics.cancelled == 1
        await p.settled()
    assert statuses(tmp_path) == {"one": CANCELLED}
    assert p.replies.unconfirmed == {"cancelled": 1}


async def test_of_a_reply_whose_deadline_passed_while_it_was_written_the_audit_claims_nothing(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        p.servicer.in_doubt(await unary(p, order("one")))
        p.servicer.in_doubt(await batch_of(p, [order(f"b{number}") for number in range(3)]))
        heard = await unary(p, order("heard"))
        p.servicer.sent(heard)
        p.servicer.in_doubt(heard)
        await p.settled()
    found = statuses(tmp_path)
    assert found.pop("heard") == REPLIED
    assert found == dict.fromkeys(("one", "b0", "b1", "b2"), UNSENT)


async def test_a_reply_that_comes_too_late_to_be_sent_was_heard_by_nobody(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        error = p.servicer.too_late(await unary(p, order("one")))
        assert error.reason == "DEADLINE_EXCEEDED"
        await p.settled()
    assert statuses(tmp_path) == {"one": DEADLINE}


async def test_a_call_that_leaves_while_its_packet_is_written_is_noted(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        with locked(p.journal):
            call = asyncio.create_task(p.decide(order("one")))
            await until(lambda: p.journal.depth == 1)
            call.cancel()
            await asyncio.wait((call,))
        await p.settled()
    assert statuses(tmp_path) == {"one": CANCELLED}


async def test_a_batch_cancelled_in_its_second_slice_was_heard_by_nobody(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        p.gate.open = asyncio.Semaphore(64 + 10)
        call = asyncio.create_task(batch_of(p, [order(f"{number}") for number in range(128)]))
        await until(lambda: p.journal.written == 64 + 10)
        call.cancel()
        await asyncio.wait((call,))
        await p.settled()
    found = statuses(tmp_path)
    assert len(found) == 64 + 10
    assert set(found.values()) == {CANCELLED}


async def test_a_batch_that_is_ready_after_its_deadline_is_not_sent(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        p.gate.open = asyncio.Semaphore(64)
        request = pb.DecideBatchRequest(orders=[order(f"{number}") for number in range(65)])
        call = asyncio.create_task(p.servicer.DecideBatch(request, p.call(5.0)))
        await until(lambda: p.gate.asked == 65)
        p.ahead_seconds = 6.0
        p.gate.open.release()
        await asyncio.wait((call,))
        assert isinstance(call.exception(), DeadlineError)
        await p.settled()
    found = statuses(tmp_path)
    assert len(found) >= 64
    assert set(found.values()) == {DEADLINE}


async def test_of_a_batch_only_what_is_in_time_for_its_order_is_sent(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        p.gate.open = asyncio.Semaphore(64)
        orders = [order(f"{number}") for number in range(65)]
        orders[3].timeout.seconds = 2
        call = asyncio.create_task(batch_of(p, orders, 9.0))
        await until(lambda: p.gate.asked == 65)
        p.ahead_seconds = 3.0
        p.gate.open.release()
        reply = await call
        p.servicer.sent(reply)
        await p.settled()
    results = pb.DecideBatchResponse.FromString(reply.wire).results
    assert [result.order_ref for result in results] == [f"{number}" for number in range(65)]
    assert [result.error.reason for result in results if result.HasField("error")] == ["DEADLINE_EXCEEDED"]
    found = statuses(tmp_path)
    assert {ref for ref, status in found.items() if status != REPLIED} == {"3"}
    assert found["3"] == DEADLINE


async def test_of_a_stream_that_closes_after_one_answer_one_was_heard(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        answers = p.stream(*(order(f"{number}") for number in range(50)))
        heard = result_in(await anext(answers)).order_ref
        under_way = result_in(await anext(answers)).order_ref
        await until(lambda: p.journal.written == 50)
        await answers.aclose()  # while the transport still has the second
        await p.settled()
    found = statuses(tmp_path)
    assert len(found) == 50
    assert {ref for ref, status in found.items() if status == REPLIED} == {heard}
    assert found[under_way] == CANCELLED


async def test_in_envoy_results_that_are_ready_together_are_handed_over_together_and_heard_together(
    tmp_path: Path,
) -> None:
    async def orders() -> AsyncIterator[pb.Order]:
        for number in range(100):
            yield order(f"{number}")

    async with request_path(tmp_path) as p:
        stream = p.servicer._decide_stream(orders(), p.call())
        heard = {result_in(answer).order_ref for answer in await anext(stream)}
        await until(lambda: sum(p.metrics.decisions.values()) == 100 and p.admission.in_flight == 0)
        under_way = {result_in(answer).order_ref for answer in await anext(stream)}
        assert p.replies.owed == 100 - len(heard)
        await stream.aclose()  # while the transport still has the second answers
        await p.settled()
    assert len(under_way) == min(64, 100 - len(heard))
    found = statuses(tmp_path)
    assert {ref for ref, status in found.items() if status == REPLIED} == heard
    assert {ref for ref, status in found.items() if status == CANCELLED} == under_way


async def test_a_stream_that_closes_while_an_order_is_decided_told_nobody(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        answers = p.stream(order("one"))
        with locked(p.journal):
            asking = asyncio.ensure_future(anext(answers))
            await until(lambda: p.journal.depth == 1)
            asking.cancel()
            await asyncio.wait((asking,))
        await p.settled()
    assert statuses(tmp_path) == {"one": CANCELLED}


async def test_an_answer_that_waits_for_a_slow_reader_past_its_deadline_is_not_sent(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        answers = p.stream(order("one"), order("two"))
        first = result_in(await anext(answers))
        await until(lambda: p.replies.owed == 2 and p.journal.written == 2 and p.journal.depth == 0)
        p.ahead_seconds = PATIENT.cap_seconds
        second = result_in(await anext(answers))
        assert second.error.reason == "DEADLINE_EXCEEDED"
        await answers.aclose()
        await p.settled()
    assert statuses(tmp_path) == {first.order_ref: REPLIED, second.order_ref: DEADLINE}


async def test_a_slow_stream_that_repeats_a_key_takes_nothing_back_from_who_heard_it_first(tmp_path: Path) -> None:
    keyed = order("first", idempotency_key="key")
    async with request_path(tmp_path) as p:
        await p.decide(keyed)
        answers = p.stream(keyed, keyed)
        await anext(answers)
        p.ahead_seconds = PATIENT.cap_seconds
        assert result_in(await anext(answers)).error.reason == "DEADLINE_EXCEEDED"
        await answers.aclose()
        await p.settled()
    assert statuses(tmp_path) == {"first": REPLIED}


async def test_a_repeat_that_hears_what_the_first_call_did_not_is_noted(tmp_path: Path) -> None:
    keyed = order("first", idempotency_key="key")
    async with request_path(tmp_path) as p:
        p.servicer.not_sent(await unary(p, keyed))
        await p.settled()
        assert statuses(tmp_path) == {"first": CANCELLED}
        for _ in range(3):
            await p.decide(keyed)
        await p.settled()
    assert statuses(tmp_path) == {"first": REPLIED}
    assert len(entries(tmp_path)) == 4, "the decision, that it was not heard, once that it may be, and that it was"


async def test_a_server_that_is_killed_denies_nothing_that_a_repeat_heard(tmp_path: Path) -> None:
    keyed = order("first", idempotency_key="key")
    async with request_path(tmp_path) as p:
        p.servicer.not_sent(await unary(p, keyed))
        await p.settled()
        reply = await unary(p, keyed)
        left = left_by_kill(tmp_path, tmp_path / "killed as it was sent")
        p.servicer.sent(reply)
        await p.settled()
    await reopened(left)
    assert (statuses(left), statuses(tmp_path)) == ({"first": REPEATED}, {"first": REPLIED})


async def test_what_a_repeat_might_hear_unnoted_is_withdrawn_for_good(tmp_path: Path) -> None:
    keyed = order("first", idempotency_key="key")
    async with request_path(tmp_path) as p:
        p.servicer.not_sent(await unary(p, keyed))
        await p.settled()
        with locked(p.journal):
            unnoted = await p.decide(keyed)
        assert (unnoted.action, unnoted.reasons[-1]) == (pb.ACTION_ABSTAIN, pb.REASON_CODE_AUDIT_UNAVAILABLE)
        await until(lambda: p.journal.writable)
        later = await p.decide(keyed)
        assert (later.action, later.reasons) == (unnoted.action, unnoted.reasons)
        await p.settled()
    assert statuses(tmp_path) == {"first": WITHDRAWN}


async def test_a_decision_of_another_process_that_a_repeat_hears_here_is_noted(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        p.replies.heard([elsewhere("heard")])
        p.replies.unheard(elsewhere("unheard"), "cancelled")
        p.replies.heard([elsewhere("never written", pb.REASON_CODE_AUDIT_UNAVAILABLE)])
        p.replies.heard([elsewhere("withdrawn, which is noted before it is told", is_withdrawn=True)])
        p.replies.heard([elsewhere("late", pb.REASON_CODE_AUDIT_LATE)])
        await p.settled()
    heard, late = entries(tmp_path)
    assert heard.reply_heard.decision_id == "heard"
    assert (late.reply_unconfirmed.decision_id, late.reply_unconfirmed.cause) == ("late", "audit_late")


def elsewhere(decision_id: str, *reasons: pb.ReasonCode.ValueType, is_withdrawn: bool = False) -> Decided:
    """A decision of another process, as a repeat finds it: when its model expires, and the decision."""
    remembered = bytes(8) + pb.Decision(decision_id=decision_id, reasons=reasons).SerializeToString()
    decided = Decided.repeated(remembered, "", is_withdrawn=is_withdrawn)
    decided.arrived = 0.0
    return decided


async def test_an_abstention_for_a_late_audit_is_noted_with_what_was_heard_even_if_its_commit_fails(
    tmp_path: Path,
) -> None:
    async with request_path(tmp_path) as p:
        with locked(p.journal):
            reply = await unary(p, order("late"), 0.15)
        decision = pb.DecideResponse.FromString(reply.wire).decision
        assert decision.reasons[-1] == pb.REASON_CODE_AUDIT_LATE
        await p.journal.flush()
        with locked(p.journal):
            p.servicer.sent(reply)
            await until(lambda: not p.journal.writable)  # the note's own commit has failed
            assert p.replies.waiting == 1
        await p.settled()
    note = entries(tmp_path)[-1].reply_unconfirmed
    assert (note.decision_id, note.cause) == (decision.decision_id, "audit_late")
    assert (note.heard_action, list(note.heard_reasons)) == (pb.ACTION_ABSTAIN, list(decision.reasons))


async def test_an_abstention_that_was_not_heard_either_is_not_noted_as_heard(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        with locked(p.journal):
            reply = await unary(p, order("late"), 0.15)
        p.servicer.not_sent(reply)
        await p.settled()
    note = entries(tmp_path)[-1].reply_unconfirmed
    assert (note.cause, note.heard_action) == ("cancelled", pb.ACTION_UNSPECIFIED)


async def test_what_could_not_be_written_owes_nothing(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        with locked(p.journal):
            decision = await p.decide(order("one"))
            assert decision.reasons[-1] == pb.REASON_CODE_AUDIT_UNAVAILABLE
        assert (p.replies.owed, p.replies.waiting) == (0, 0)
    assert entries(tmp_path) == []


async def test_a_decision_whose_reporting_fails_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    async with request_path(tmp_path) as p:
        monkeypatch.setattr(p.metrics, "observe", fail)
        with pytest.raises(InternalError):
            await p.servicer.Decide(pb.DecideRequest(order=order("one")), p.call())
        await p.settled()
    assert statuses(tmp_path) == {"one": "reply_unconfirmed:failed"}


async def test_an_answer_that_nobody_takes_for_seconds_is_noted_and_may_be_heard_after_all(tmp_path: Path) -> None:
    async with request_path(tmp_path, PATIENT.model_copy(update={"cap_seconds": 60.0})) as p:
        reply = await unary(p, order("one"))
        assert p.replies.owed == 1
        p.ahead_seconds = 6.0
        await p.settled()
        assert statuses(tmp_path) == {"one": UNSENT}
        left = left_by_kill(tmp_path, tmp_path / "killed as it was read")
        p.servicer.sent(reply)
        await p.settled()
    await reopened(left)
    assert (statuses(left), statuses(tmp_path)) == ({"one": UNSENT}, {"one": REPLIED})


@pytest.mark.parametrize("repeats", [False, True])
async def test_an_answer_that_nobody_took_is_noted_as_not_heard_once_its_call_has_ended(
    tmp_path: Path, repeats: bool
) -> None:
    keyed = order("one", idempotency_key="key")
    async with request_path(tmp_path, PATIENT.model_copy(update={"cap_seconds": 60.0})) as p:
        reply = await unary(p, keyed)
        p.ahead_seconds = 6.0
        await p.settled()
        if repeats:
            repeat = await unary(p, keyed)
        p.servicer.not_sent(reply)
        await p.settled()
        assert statuses(tmp_path) == {"one": REPEATED if repeats else CANCELLED}
        if repeats:
            p.servicer.sent(repeat)
            await p.settled()
    assert statuses(tmp_path) == {"one": REPLIED if repeats else CANCELLED}
    assert p.replies.unconfirmed == {"unsent": 1}


async def test_what_is_left_at_the_end_is_noted(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        await unary(p, order("one"))
    assert statuses(tmp_path) == {"one": UNSENT}


async def test_more_than_can_be_remembered_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.decision.replies._MOST", 2)
    async with request_path(tmp_path) as p:
        for number in range(2):
            await unary(p, order(f"{number}"))
        decision = await p.decide(order("one too many"))
        assert (decision.action, decision.reasons[-1]) == (pb.ACTION_ABSTAIN, pb.REASON_CODE_AUDIT_UNAVAILABLE)


async def test_notes_that_wait_are_logged_once_and_so_is_their_end(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        replies = [await unary(p, order(f"{number}")) for number in range(20)]
        with capture_logs() as lines:
            with locked(p.journal):
                failed = p.journal.append(b"")
                await asyncio.wait((failed,))
                for reply in replies:
                    p.servicer.not_sent(reply)
                assert p.replies.waiting == 20
            await until(lambda: "reply_notes_written" in [line["event"] for line in lines])
        ours = [line["event"] for line in lines if line["event"].startswith("reply_")]
        assert ours == ["reply_notes_wait", "reply_notes_written"]
    assert set(statuses(tmp_path).values()) == {CANCELLED}


class Disk:
    """As much of a journal as the ledger knows, which fails when it is told to."""

    def __init__(self) -> None:
        self.writable = True
        self.problem = ""
        self.refuses = False
        self.held: OrderedDict[Decided, int] = OrderedDict()
        self.rows: list[packet_pb2.JournalEntry] = []
        self.under_way: list[tuple[bytes, asyncio.Future[bool]]] = []

    def hold(self, decided: Decided) -> None:
        self.held[decided] = len(self.rows)

    def release(self, decided: Decided) -> None:
        self.held.pop(decided, None)

    def append(self, entry: bytes, *, even_if_full: bool = False) -> asyncio.Future[bool]:
        if not self.writable or self.refuses:
            raise JournalUnwritableError("the disk")
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.under_way.append((entry, future))
        return future

    def commit(self) -> None:
        """What is under way becomes durable, in order."""
        for entry, future in self.under_way:
            self.rows.append(packet_pb2.JournalEntry.FromString(entry))
            future.set_result(True)
        self.under_way.clear()

    def fail(self) -> None:
        """What is under way does not become durable."""
        for _, future in self.under_way:
            future.set_exception(JournalUnwritableError("the disk"))
        self.under_way.clear()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ("owe", "heard", "unheard", "unsent", "commit", "fail", "break", "heal", "refuse", "accept", "tick")
        ),
        st.integers(0, 3),
    ),
    max_size=60,
)


class Course:
    """Some decisions on their way, on a disk with its moods."""

    def __init__(self) -> None:
        self.disk = Disk()
        journal: Any = self.disk
        self.replies = Replies(journal, lambda: 1_000.0)
        self.made: dict[int, Decided] = {}
        self.heard: set[str] = set()

    async def take(self, step: str, number: int) -> None:
        disk, decided = self.disk, self.made.get(number)
        match step:
            case "owe" if decided is None:
                decided = self.made[number] = elsewhere(f"{number}")
                self.replies.owe(decided)
            case "heard" if decided is not None:
                self.replies.heard([decided])
                self.heard.add(decided.decision_id)
            case "unheard" if decided is not None:
                self.replies.unheard(decided, "cancelled")
            case "unsent":
                self.replies._note_unsent(before=1_000.0)
            case "commit" if disk.writable:
                disk.commit()
            case "fail" | "break":
                disk.writable = disk.writable and step == "fail"
                disk.fail()
            case "heal":
                disk.writable = True
            case "refuse" | "accept":
                disk.refuses = step == "refuse"
            case "tick":
                self.replies._write_again()
        await asyncio.sleep(0)

    async def end(self) -> None:
        """Nobody hears anything any more, and the disk is well."""
        for decided in self.made.values():
            self.replies.unheard(decided, "cancelled")
        self.disk.writable, self.disk.refuses = True, False
        while self.replies.waiting:
            await self.take("tick", 0)
            await self.take("commit", 0)


@given(steps=STEPS)
def test_in_the_end_the_last_word_about_each_decision_is_the_truth(steps: list[tuple[str, int]]) -> None:
    async def run() -> None:
        course = Course()
        for step, number in steps:
            await course.take(step, number)
        await course.end()
        assert course.replies.owed == 0
        said = {decided.decision_id: True for decided in course.made.values()}
        for row in course.disk.rows:
            said[row.reply_heard.decision_id or row.reply_unconfirmed.decision_id] = row.HasField("reply_heard")
        assert {one for one, is_heard in said.items() if is_heard} == course.heard

    asyncio.run(run())


KILLED = "reply_unconfirmed:killed"


async def reopened(path: Path) -> dict[str, int]:
    """Opens the journal in a directory, as the next process does; what it has marked, by cause."""
    async with Journal(JournalSettings(path=path / "journal.db")) as journal:
        await journal.flush()
    return {str(cause): decisions for cause, decisions in journal.marked.items()}


def settled(path: Path) -> int:
    with closing(JournalReader(path / "journal.db")) as reader:
        return reader.settled()


async def test_after_a_kill_what_was_not_known_to_be_heard_is_not_called_replied(tmp_path: Path) -> None:
    async with request_path(tmp_path / "alive") as p:
        await p.decide(order("heard"))
        await until(lambda: settled(tmp_path / "alive") == 1)  # nothing more comes: it is written by itself
        reply = await unary(p, order("under way"))
        await p.decide(order("heard later"))
        await p.settled_on_disk()
        left = left_by_kill(tmp_path / "alive", tmp_path / "killed")
        p.servicer.sent(reply)
        await until(lambda: settled(tmp_path / "alive") == 3)
    assert await reopened(left) == {"killed": 2}
    assert statuses(left) == {"heard": REPLIED, "under way": KILLED, "heard later": KILLED}
    assert settled(left) == 5
    assert await reopened(left) == {}, "they are marked once"
    assert set(statuses(tmp_path / "alive").values()) == {REPLIED}
    assert await reopened(tmp_path / "alive") == {}


async def test_after_a_kill_a_note_that_was_not_durable_yet_is_not_needed(tmp_path: Path) -> None:
    async with request_path(tmp_path / "alive") as p:
        heard = await unary(p, order("noted"))
        p.servicer.not_sent(heard)
        await p.settled()
        reply = await unary(p, order("gone"))
        with locked(p.journal):
            p.servicer.not_sent(reply)
            left = left_by_kill(tmp_path / "alive", tmp_path / "killed")
    assert await reopened(left) == {"killed": 1}
    assert statuses(left) == {"noted": CANCELLED, "gone": KILLED}


async def test_nobody_is_told_of_a_decision_as_replied_before_it_is(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        reply = await unary(p, order("one"))
        await p.decide(order("two"))
        await p.settled_on_disk()
        with (
            closing(AuditQuery(None, tmp_path / "journal.db")) as query,
            closing(JournalReader(tmp_path / "journal.db")) as reader,
        ):
            (newest, first) = query.page(audit_pb2.DecisionFilter(), 10, "").decisions
            assert (newest.reply_status, first.reply_status) == (UNSETTLED, UNSETTLED)
            assert query.get(first.packet.decision.decision_id).reply_status == UNSETTLED
            wanted = audit_pb2.WatchDecisionsRequest(from_oldest=True)
            step = query.journals.after(wanted)
            assert query.journals.after(audit_pb2.WatchDecisionsRequest(cursor=step.cursor)).events == []
            assert reader.settled_rows_after(0, 10) == []
            p.servicer.sent(reply)
            await until(lambda: len(reader.settled_rows_after(0, 10)) == 2)
            events = query.journals.after(audit_pb2.WatchDecisionsRequest(cursor=step.cursor)).events
            assert [event.decision.reply_status for event in events] == [REPLIED, REPLIED]
            assert query.get(first.packet.decision.decision_id).reply_status == REPLIED


async def test_what_a_killed_process_left_is_settled_before_it_is_shipped(tmp_path: Path) -> None:
    async with request_path(tmp_path / "alive") as p:
        await unary(p, order("under way"))
        await p.settled_on_disk()
        left = left_by_kill(tmp_path / "alive", tmp_path / "killed")
    assert settle_what_was_left(left / "journal.db") == 2
    assert statuses(left) == {"under way": KILLED}
    assert settled(left) == 2


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(("decide", "heard", "unheard", "flush", "look"))), max_size=25
    )
)
def test_whenever_a_process_is_killed_replied_is_what_was_heard(steps: list[tuple[int, str]]) -> None:
    """A row that says `replied` after the next start was heard; one that was not heard says so."""

    async def run(directory: Path) -> None:
        async with Journal(JournalSettings(path=directory / "journal.db", durability=Durability.OS)) as journal:
            replies = Replies(journal, asyncio.get_running_loop().time)
            made: dict[int, Decided] = {}
            heard = set()
            for number, step in steps:
                match step:
                    case "decide" if number not in made:
                        made[number] = elsewhere(f"{number}")
                        replies.owe(made[number])
                        await journal.append(packet(f"{number}"))
                    case "heard" if number in made:
                        replies.heard([made[number]])
                        heard.add(f"{number}")
                    case "unheard" if number in made:
                        replies.unheard(made[number], "cancelled")
                    case "flush":
                        await journal.flush()
                    case "look":
                        journal._settle_if_idle()
            left = left_by_kill(directory, directory / "killed")
            rows = {f"{number}" for number in made}
        await reopened(left)
        found = statuses(left)
        assert found.keys() == rows
        assert {ref for ref, status in found.items() if status == REPLIED} <= heard

    with TemporaryDirectory() as directory:
        asyncio.run(run(Path(directory)))


def packet(decision_id: str) -> bytes:
    entry = packet_pb2.JournalEntry()
    entry.decision.decision.decision_id = entry.decision.order.order_ref = decision_id
    return entry.SerializeToString()


@pytest.mark.parametrize("entries", [*itertools.permutations(("cancelled", "repeated", "withdrawn", "heard"))])
def test_what_repeats_heard_holds_over_the_first_reply_and_withdrawn_over_all(entries: tuple[str, ...]) -> None:
    """As three journals may hold it, read in any order."""
    said = {
        "cancelled": reply_status.unconfirmed("d", "cancelled"),
        "repeated": reply_status.unconfirmed("d", "repeated"),
        "withdrawn": reply_status.unconfirmed("d", "withdrawn", pb.ACTION_NO_TRADE, [pb.REASON_CODE_TRADING_HALTED]),
        "heard": reply_status.heard("d"),
    }
    statuses = Statuses()
    for name in entries:
        statuses.add(packet_pb2.JournalEntry.FromString(said[name]))
    withdrawn = Reply(WITHDRAWN, audit_pb2.HEARD_ACTION_NO_TRADE, (pb.REASON_CODE_TRADING_HALTED,))
    statuses.add_repeats({"d": AS_DECIDED, "e": withdrawn})
    assert (statuses.of("d"), statuses.of("e"), statuses.of("f")) == (withdrawn, withdrawn, None)
    two = Statuses()
    for name in entries:
        if name != "withdrawn":
            two.add(packet_pb2.JournalEntry.FromString(said[name]))
    assert two.of("d") == AS_DECIDED
    perhaps, known = Statuses(), Statuses()
    for name in entries:
        if name in ("cancelled", "repeated"):
            perhaps.add(packet_pb2.JournalEntry.FromString(said[name]))
    assert perhaps.of("d") == Reply(REPEATED, audit_pb2.HEARD_ACTION_UNKNOWN)
    known.add(packet_pb2.JournalEntry.FromString(said["repeated"]))
    assert known.of("d") is None, "the first call heard it"


async def test_a_watcher_is_told_what_each_caller_heard(tmp_path: Path) -> None:
    async with request_path(tmp_path) as p:
        await p.decide(order("one"))
        p.servicer.not_sent(await unary(p, order("two")))
        await p.settled_on_disk()
        await p.decide(order("three"))
        await until(lambda: settled(tmp_path) >= 4)
        with closing(AuditQuery(None, tmp_path / "journal.db")) as query:
            cursor = query.journals.after(audit_pb2.WatchDecisionsRequest(from_oldest=True)).cursor

            def watched(*heard: audit_pb2.HeardAction.ValueType) -> dict[str, audit_pb2.HeardAction.ValueType]:
                wanted = audit_pb2.DecisionFilter(heard_actions=heard)
                step = query.journals.after(audit_pb2.WatchDecisionsRequest(filter=wanted, cursor=cursor))
                found = (event.decision for event in step.events if event.HasField("decision"))
                return {one.packet.order.order_ref: one.heard_action for one in found}

            abstain, nothing = audit_pb2.HEARD_ACTION_ABSTAIN, audit_pb2.HEARD_ACTION_NOTHING
            assert watched() == {"one": abstain, "two": nothing, "three": abstain}
            assert watched(nothing) == {"two": nothing}
            assert watched(abstain) == {"one": abstain, "three": abstain}


@pytest.mark.parametrize(
    ("cause", "heard"),
    [
        *((cause, audit_pb2.HEARD_ACTION_NOTHING) for cause in ("cancelled", "deadline", "failed")),
        ("superseded", audit_pb2.HEARD_ACTION_NOTHING),
        ("killed", audit_pb2.HEARD_ACTION_UNKNOWN),
        ("unsent", audit_pb2.HEARD_ACTION_UNKNOWN),
        ("repeated", audit_pb2.HEARD_ACTION_UNKNOWN),
        ("of another version", audit_pb2.HEARD_ACTION_UNKNOWN),
    ],
)
def test_without_an_action_nothing_was_heard_or_nobody_knows(
    cause: str, heard: audit_pb2.HeardAction.ValueType
) -> None:
    assert reply_of(packet_pb2.ReplyUnconfirmed(decision_id="d", cause=cause)).heard_action == heard


def test_that_a_repeat_may_hear_a_decision_does_not_say_what_the_first_call_heard() -> None:
    repeated = reply_status.unconfirmed("d", "repeated")
    (note,) = notes_of(unknown_replies([Row(1, packet("d"), b""), Row(2, repeated, b"")]), "killed")
    assert packet_pb2.JournalEntry.FromString(note).reply_unconfirmed.cause == "killed"


def test_what_a_failed_commit_left_on_disk_was_heard_as_an_abstention() -> None:
    entry = packet_pb2.JournalEntry.FromString(packet("d"))
    entry.decision.decision.reasons.append(pb.REASON_CODE_RULES_PASSED)
    (note,) = notes_of(unknown_replies([Row(1, entry.SerializeToString(), b"")]), "not_durable")
    reply = reply_of(packet_pb2.JournalEntry.FromString(note).reply_unconfirmed)
    reasons = (pb.REASON_CODE_RULES_PASSED, pb.REASON_CODE_AUDIT_UNAVAILABLE)
    assert reply == Reply("reply_unconfirmed:not_durable", audit_pb2.HEARD_ACTION_ABSTAIN, reasons)
