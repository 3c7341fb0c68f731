"""Processes that read the audit: real ones, beside an empty journal and an empty database."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrade.audit.v1 import audit_pb2
from server.audit.reading.reading import Question, Reading, ReadingProcess, Task
from server.errors import AuditBusyError, AuditUnavailableError, InvalidRequestError, UnknownDecisionError

LIST = audit_pb2.ListDecisionsRequest(page_size=7).SerializeToString()


def readers() -> list[psutil.Process]:
    children = [one for one in psutil.Process(os.getpid()).children() if one.status() != psutil.STATUS_ZOMBIE]
    return [one for one in children if "server.composition.reading_process" in one.cmdline()]


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[ReadingProcess]:
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    async with ReadingProcess(
        "reads", Task(journal=tmp_path / "journal.db", database_url=url, model_store=None)
    ) as one:
        yield one
    assert not readers()


async def test_it_starts_with_the_first_question_and_answers_all_kinds(process: ReadingProcess) -> None:
    assert not readers()
    lookups, replays = Reading("lookups", process), Reading("replays", process)
    empty = audit_pb2.GetDecisionRequest(decision_id="nobody").SerializeToString()
    asked: list[Any] = [lookups.ask(Question.GET, empty), replays.ask(Question.REPLAY, empty)]
    for error in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(error, AuditUnavailableError | UnknownDecisionError), error
    assert len(readers()) == 1
    assert (lookups.asked, lookups.waiting, process.ended) == (1, 0, 0)


async def test_errors_are_those_of_the_process(process: ReadingProcess) -> None:
    lookups = Reading("lookups", process)
    with pytest.raises(InvalidRequestError, match="page_size: must be 1 to 500"):
        await lookups.ask(Question.LIST, audit_pb2.ListDecisionsRequest(page_size=501).SerializeToString())
    with pytest.raises(InvalidRequestError, match="not a valid message"):
        await lookups.ask(Question.LIST, b"\xff\xff")


async def test_its_socket_has_no_name_that_a_killed_process_could_leave_behind_and_decisions_come_first(
    process: ReadingProcess,
) -> None:
    with pytest.raises(AuditUnavailableError):
        await Reading("lookups", process).ask(Question.LIST, LIST)
    (reader,) = readers()
    sockets = [Path(str(one.laddr)) for one in reader.net_connections("unix") if one.laddr]
    assert sockets
    assert not any(socket.parent.exists() for socket in sockets)
    assert (await asyncio.to_thread(reader.nice)) > psutil.Process(os.getpid()).nice()


@pytest.mark.long
async def test_one_that_was_killed_is_replaced_before_the_next_question(process: ReadingProcess) -> None:
    lookups = Reading("lookups", process)
    with pytest.raises(InvalidRequestError):
        await lookups.ask(Question.LIST, b"\xff\xff")
    (reader,) = readers()
    reader.kill()
    await asyncio.to_thread(reader.wait, 10)
    with pytest.raises((InvalidRequestError, AuditUnavailableError)):
        await lookups.ask(Question.LIST, b"\xff\xff")
    with pytest.raises(InvalidRequestError):
        await lookups.ask(Question.LIST, b"\xff\xff")
    assert process.ended == 1
    assert [one.pid for one in readers()] != [reader.pid]


async def test_every_question_under_way_hears_that_the_process_was_killed_and_none_is_cancelled(
    process: ReadingProcess,
) -> None:
    readings = [Reading("lookups", process), Reading("watching", process)]
    with pytest.raises(InvalidRequestError):
        await readings[0].ask(Question.LIST, b"\xff\xff")
    (reader,) = readers()
    reader.suspend()
    questions = [asyncio.create_task(reading.ask(Question.LIST, LIST)) for reading in readings * 10]
    await asyncio.sleep(0)
    reader.kill()
    heard = await asyncio.gather(*questions, return_exceptions=True)
    assert {type(one) for one in heard} == {AuditUnavailableError}, heard
    assert process.ended == 1


async def test_a_question_that_is_given_up_harms_no_other(process: ReadingProcess) -> None:
    lookups = Reading("lookups", process)
    given_up = asyncio.create_task(lookups.ask(Question.LIST, b"\xff\xff"))
    other = asyncio.create_task(lookups.ask(Question.LIST, b"\xff\xff"))
    await asyncio.sleep(0)
    assert lookups.waiting == 2
    given_up.cancel()
    with pytest.raises(InvalidRequestError):
        await other
    assert (given_up.cancelled(), lookups.waiting, process.ended) == (True, 0, 0)


async def test_more_questions_than_may_wait_are_refused_at_once(process: ReadingProcess) -> None:
    lookups = Reading("lookups", process)
    waiting = [asyncio.create_task(lookups.ask(Question.LIST, b"\xff\xff")) for _ in range(32)]
    await asyncio.sleep(0)
    with pytest.raises(AuditBusyError, match="32 requests wait already"):
        await lookups.ask(Question.LIST, LIST)
    assert {type(one) for one in await asyncio.gather(*waiting, return_exceptions=True)} == {InvalidRequestError}
