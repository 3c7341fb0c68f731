"""The process that reads the audit for a server: `python -m server.composition.reading_process`.

Its parent writes a `Task` as one line of JSON to its standard input, then questions, each a header and a serialised
request; answers go to standard output in the same order. It exits at the end of its input.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import time
import traceback
from contextlib import closing

from google.protobuf.message import DecodeError

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2, packet_pb2
from server.audit.reading.explain import Explainer
from server.audit.reading.query import AuditQuery
from server.audit.reading.reading import ERRORS, EVENT, REQUEST, RESPONSE, STEP, Question, Task
from server.audit.replay.replay import Replay, Replayer, fact_of_reply
from server.drift.summary import metadata_of, summarise
from server.drift.watch import DriftRequest, packed
from server.errors import AuditError, AuditUnavailableError, InvalidRequestError, ModelFailedError
from server.models.archive import ModelStore


class Answering:
    """Answers one question after another.

    Args:
        task: What to read.
    """

    def __init__(self, task: Task) -> None:
        self._query = AuditQuery(task.database_url, task.journal)
        self._store = ModelStore([] if task.model_store is None else [task.model_store])
        self._replayer = self._new_replayer()
        self._explainer = Explainer(self._query.packet, self._store.find)

    def close(self) -> None:
        """Closes connections and ends models."""
        self._replayer.__exit__()
        self._explainer.__exit__()
        self._query.close()

    def answer(self, question: Question, request: bytes) -> bytes:  # noqa: PLR0911 - one for each question
        """The serialised answer.

        Raises:
            AuditError: There is none.
        """
        try:
            match question:
                case Question.GET:
                    return self._get(audit_pb2.GetDecisionRequest.FromString(request))
                case Question.LIST:
                    wanted = audit_pb2.ListDecisionsRequest.FromString(request)
                    page = self._query.page(wanted.filter, wanted.page_size, wanted.page_token)
                    return page.SerializeToString()
                case Question.WATCH:
                    return self._watch(audit_pb2.WatchDecisionsRequest.FromString(request))
                case Question.RECORDED:
                    before = self._query.recorded(packet_pb2.Outcome.FromString(request))
                    return b"" if before is None else before.SerializeToString()
                case Question.REPLAY:
                    return self._replay(audit_pb2.ReplayDecisionRequest.FromString(request))
                case Question.EXPLAIN:
                    return self._explain(audit_pb2.ExplainDecisionRequest.FromString(request))
                case Question.DRIFT:
                    return self._drift(DriftRequest.model_validate_json(request))
                case Question.CHANGES:
                    return self._query.changes(admin_pb2.ListChangesRequest.FromString(request)).SerializeToString()
        except DecodeError as error:
            raise InvalidRequestError("the request is not a valid message of this method") from error

    def _get(self, request: audit_pb2.GetDecisionRequest) -> bytes:
        response = audit_pb2.GetDecisionResponse(decision=self._query.get(request.decision_id))
        try:
            response.outcomes.extend(self._query.outcomes(request.decision_id))
        except AuditUnavailableError as error:
            response.incomplete = str(error)
        return response.SerializeToString()

    def _watch(self, request: audit_pb2.WatchDecisionsRequest) -> bytes:
        step = self._query.journals.after(request)
        cursor = step.cursor.encode()
        parts = [STEP.pack(step.more, len(cursor)), cursor]
        for event in step.events:
            packed = event.SerializeToString()
            parts += (EVENT.pack(len(packed)), packed)
        return b"".join(parts)

    def _replay(self, request: audit_pb2.ReplayDecisionRequest) -> bytes:
        recorded = self._query.get(request.decision_id)
        try:
            response = response_of(asyncio.run(self._replayer.replay(recorded.packet)))
        except ModelFailedError:
            # Its process may be gone: the next replay starts it anew.
            self._replayer.__exit__()
            self._replayer = self._new_replayer()
            raise
        response.facts.extend(fact_of_reply(recorded.reply_status))
        return response.SerializeToString()

    def _explain(self, request: audit_pb2.ExplainDecisionRequest) -> bytes:
        # A decision that was just made is in the journal, whatever the database does.
        recorded = self._query.journals.find(request.decision_id, []) if request.decision_id else None
        packet = (recorded or self._query.get(request.decision_id)).packet
        return audit_pb2.ExplainDecisionResponse(explanation=self._explainer.explain(packet)).SerializeToString()

    def _drift(self, request: DriftRequest) -> bytes:
        wanted = audit_pb2.DecisionFilter()
        wanted.since.FromNanoseconds(time.time_ns() - int(request.window_seconds * 1e9))
        packets = (one.packet for one in self._query.newest(wanted, request.max_decisions))
        return packed(summarise(packets, lambda version: metadata_of(self._store.find(version).files)))

    def _new_replayer(self) -> Replayer:
        return Replayer(self._query.settings, self._query.packet, self._store.find)


def response_of(replay: Replay) -> audit_pb2.ReplayDecisionResponse:
    """A replay in the contract's words."""
    response = audit_pb2.ReplayDecisionResponse(
        equal=replay.first_difference is None,
        action=replay.action,
        score=None if math.isnan(replay.score) else replay.score,
        reasons=replay.reasons,
        facts=replay.facts,
    )
    if replay.first_difference is not None:
        difference = replay.first_difference
        response.first_difference.field = difference.field
        response.first_difference.recorded = difference.recorded
        response.first_difference.replayed = difference.replayed
    return response


def main() -> None:
    """Answers until the input ends."""
    # The server decides when this ends, also where a terminal or a supervisor signals the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with closing(Answering(Task.model_validate_json(questions.readline()))) as answering:
        while header := questions.read(REQUEST.size):
            question, length = REQUEST.unpack(header)
            status, answer = _answered(answering, Question(question), questions.read(length))
            answers.write(RESPONSE.pack(status, len(answer)) + answer)
            answers.flush()


def _answered(answering: Answering, question: Question, request: bytes) -> tuple[int, bytes]:
    try:
        return 0, answering.answer(question, request)
    except AuditError as error:
        kind = ERRORS.index(type(error)) if type(error) in ERRORS else 0
        return 1 + kind, str(error).encode()
    except Exception:  # a fault of ours: the caller hears of it, and the next question is answered
        traceback.print_exc()
        return 1, b"a fault while reading the audit, which the log explains"


if __name__ == "__main__":
    main()
