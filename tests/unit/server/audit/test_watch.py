"""The server asks what the audit says of itself, and shows it as metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from support.waiting import until

from pretrade.wire.reading import reading_pb2
from server.audit.metrics import of_watch
from server.audit.reading.reading import Question, Reading, ReadingProcess, Task
from server.audit.watch import AuditWatch, AuditWatchSettings
from server.errors import AuditUnavailableError


class Answers(Reading):
    """Gives each answer once, and the last one for ever; None stands for a failure."""

    def __init__(self, *answers: reading_pb2.CheckAuditResponse | None) -> None:
        super().__init__("checks", ReadingProcess("reads", Task(journal=Path(), database_url="", model_store=None)))
        self.answers = list(answers)
        self.requests: list[reading_pb2.CheckAuditRequest] = []

    async def ask(self, question: Question, request: bytes) -> bytes:
        assert question is Question.CHECK
        self.requests.append(reading_pb2.CheckAuditRequest.FromString(request))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise AuditUnavailableError("the database: away")
        return answer.SerializeToString()


async def watched(reading: Answers, done: Callable[[AuditWatch], bool]) -> AuditWatch:
    watch = AuditWatch(reading, AuditWatchSettings(interval_seconds=0.001), lambda: {"default": "v1"})
    watching = asyncio.create_task(watch.run())
    await until(lambda: done(watch))
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    return watch


def samples(watch: AuditWatch) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in of_watch(watch):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def answer(**fields: Any) -> reading_pb2.CheckAuditResponse:
    found = reading_pb2.CheckAuditResponse(label_lag_seconds=90, stranded={"journal.db.1": 3, "journal.db.2": 4})
    found.deserted["4f"] = "server-2:/journal.db"
    found.calibrations["default"].CopyFrom(
        reading_pb2.Calibration(independent=50, predicted=0.75, observed=0.5, error=0.25, **fields)
    )
    return found


async def test_the_newest_answer_is_shown_by_model() -> None:
    reading = Answers(answer(limit=0.125))
    watch = await watched(reading, lambda watch: watch.newest is not None)
    assert dict(reading.requests[0].champions) == {"default": "v1"}
    assert [(name, labels.get("model"), value) for name, labels, value in samples(watch)] == [
        ("pretrade_audit_checks_failed_total", None, 0),
        ("pretrade_calibration_error", "default", 0.25),
        ("pretrade_calibration_error_limit", "default", 0.125),
        ("pretrade_calibration_predicted_ratio", "default", 0.75),
        ("pretrade_calibration_observed_ratio", "default", 0.5),
        ("pretrade_calibration_independent", "default", 50),
        ("pretrade_label_lag_seconds", None, 90),
        ("pretrade_journal_stranded_entries", None, 7),
        ("pretrade_journal_deserted", None, 1),
    ]


async def test_a_look_that_fails_is_counted_logged_once_and_shows_nothing_old() -> None:
    with capture_logs() as logs:
        watch = await watched(Answers(answer(), None), lambda watch: watch.failures >= 3)
    assert [name for name, _, _ in samples(watch)] == ["pretrade_audit_checks_failed_total"]
    assert [one["event"] for one in logs] == ["journals_stranded", "journals_deserted", "audit_not_checked"]


async def test_stranded_and_deserted_journals_are_logged_when_they_change() -> None:
    with capture_logs() as logs:
        await watched(
            Answers(answer(), answer(), reading_pb2.CheckAuditResponse()),
            lambda watch: watch.newest is not None and not watch.newest.stranded,
        )
    assert [(one["event"], one["journals"]) for one in logs] == [
        ("journals_stranded", ["journal.db.1", "journal.db.2"]),
        ("journals_deserted", {"4f": "server-2:/journal.db"}),
        ("journals_stranded", []),
        ("journals_deserted", {}),
    ]


async def test_an_interval_of_0_asks_nothing() -> None:
    reading = Answers(None)
    watch = AuditWatch(reading, AuditWatchSettings(interval_seconds=0), dict)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watch.run(), 0.05)
    assert not reading.requests
