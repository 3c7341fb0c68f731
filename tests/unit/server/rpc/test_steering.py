"""What is said and steered of a role with several endpoints."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from support.control_files import that_trades
from support.scripted_replica import ScriptedReplica, answers

from pretrade.admin.v1 import admin_pb2 as pb
from server.control.state import ControlSettings, ControlState
from server.control.subjects import breaker_subjects, drain_subjects
from server.errors import UnknownSubjectError
from server.inference.pool import Pool
from server.inference.replicas import Replicas
from server.journal.journal import Journal, JournalSettings
from server.rpc.steering import Steering


def steered(journal: Journal, path: Path) -> tuple[Steering, Replicas]:
    primaries = [ScriptedReplica(f"primary-{number}", answers(0.75)) for number in (1, 2)]
    secondary, challenger = (ScriptedReplica(name, answers(0.75)) for name in ("secondary", "challenger"))
    replicas = Replicas(Pool("primary", primaries, lambda: 0.0), secondary, (challenger,))
    ids = (f"change-{number}" for number in itertools.count())
    control = ControlState(
        ControlSettings(), that_trades(path), {}, journal, "one", lambda: next(ids), time.time_ns, time.monotonic
    )
    control.steer(breaker_subjects(replicas.roles) | drain_subjects(replicas.roles))
    return Steering(control, replicas), replicas


async def test_each_endpoint_is_listed_by_its_own_name_in_its_role(tmp_path: Path) -> None:
    async with Journal(JournalSettings(path=tmp_path / "journal.db")) as journal:
        steering, replicas = steered(journal, tmp_path / "control.json")
        replicas["primary-2"].ejected = "does not serve model ab"
        listed = steering.replica_list().replicas
    assert [(one.name, one.role, one.ejected) for one in listed] == [
        ("primary-1", pb.REPLICA_ROLE_PRIMARY, ""),
        ("primary-2", pb.REPLICA_ROLE_PRIMARY, "does not serve model ab"),
        ("secondary", pb.REPLICA_ROLE_SECONDARY, ""),
        ("challenger", pb.REPLICA_ROLE_CHALLENGER, ""),
    ]


async def test_one_endpoint_is_drained_or_all_of_a_role(tmp_path: Path) -> None:
    async with Journal(JournalSettings(path=tmp_path / "journal.db")) as journal:
        steering, replicas = steered(journal, tmp_path / "control.json")
        await steering.drain(pb.DrainReplicaRequest(replica="primary-2", reason="kernel"), "ann")
        assert [replicas[name].drained for name in ("primary-1", "primary-2")] == [False, True]
        drained = await steering.drain(pb.DrainReplicaRequest(replica="primary", reason="kernel"), "ann")
        assert (drained.replica.name, drained.replica.drained) == ("primary", True)
        resumed = await steering.resume(pb.ResumeReplicaRequest(replica="primary", reason="well"), "ann")
        assert not resumed.replica.drained
        assert [replicas[name].drained for name in ("primary-1", "primary-2")] == [False, True]
        request = pb.SetBreakerRequest(replica="primary", mode=pb.BREAKER_MODE_FORCED_OPEN, reason="bad scores")
        forced = await steering.set_breaker(request, "ann")
        assert forced.replica.breaker_mode == pb.BREAKER_MODE_FORCED_OPEN
        assert not replicas.primary.available


async def test_what_is_neither_an_endpoint_nor_a_role_is_refused_with_what_there_is(tmp_path: Path) -> None:
    async with Journal(JournalSettings(path=tmp_path / "journal.db")) as journal:
        steering, _ = steered(journal, tmp_path / "control.json")
        with pytest.raises(UnknownSubjectError, match="primary-1, primary-2, secondary, challenger, primary"):
            await steering.drain(pb.DrainReplicaRequest(replica="primary-3", reason="kernel"), "ann")
