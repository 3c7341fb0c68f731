"""`AuditService` of a server of several processes: whichever answers, it sees what each of them has in its journal."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from support.bare_server import admin_channel, decide
from support.harness import eventually
from support.server_group import Group, server_group

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.audit.v1 import audit_pb2, audit_pb2_grpc, packet_pb2
from server.audit.store.store import Store

SECONDS = 30.0
OF_BARE_SERVERS = {"PRETRADE_INSTRUMENTS": '["BTCUSDT.BINANCE"]'}
"""The instrument that `bare_server.decide` asks about."""


@contextmanager
def nothing_shipped(group: Group) -> Iterator[None]:
    """Stops the shipping processes, so that every row is in a journal alone."""

    def shipping() -> list[psutil.Process]:
        family = psutil.Process(group.supervisor.pid).children(recursive=True)
        return [one for one in family if one.cmdline()[1:3] == ["-m", "server.audit"]]

    processes = eventually(shipping, lambda found: len(found) == 2)
    for process in processes:
        process.suspend()
    yield
    for process in processes:
        process.resume()


def services(group: Group, stack: ExitStack) -> list[audit_pb2_grpc.AuditServiceStub]:
    """The audit service of each process, which all have the same address: the kernel picks one per connection."""
    found: dict[str, audit_pb2_grpc.AuditServiceStub] = {}

    def connect() -> int:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = stack.enter_context(admin_channel(group.env, options))
        status = admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=SECONDS)
        found[status.instance_id] = audit_pb2_grpc.AuditServiceStub(channel)
        return len(found)

    eventually(connect, lambda processes: processes == 2)
    return list(found.values())


def record(
    service: audit_pb2_grpc.AuditServiceStub, decision_id: str, filled: float
) -> audit_pb2.RecordOutcomeResponse | grpc.StatusCode:
    outcome = packet_pb2.Outcome(decision_id=decision_id, reporter="ems", filled_quantity=filled, fill_price=1.0)
    try:
        return service.RecordOutcome(audit_pb2.RecordOutcomeRequest(outcome=outcome), timeout=SECONDS)
    except grpc.RpcError as error:
        return error.code()


@pytest.mark.long
@pytest.mark.timeout(120)
def test_every_process_sees_the_audit_of_all_before_anything_was_shipped(tmp_path: Path) -> None:
    with server_group(tmp_path, 2, **OF_BARE_SERVERS) as group, nothing_shipped(group), ExitStack() as stack:
        both = services(group, stack)
        watch = both[0].WatchDecisions(audit_pb2.WatchDecisionsRequest(), timeout=120.0)
        watch.initial_metadata()  # from here on everything is heard
        made: list[str] = []

        def holders() -> set[str]:
            """Journals that hold a decision."""
            made.append(decide(int(group.env["PRETRADE_GRPC__PORT"])).decision_id)
            page = both[0].ListDecisions(audit_pb2.ListDecisionsRequest(page_size=500), timeout=SECONDS)
            assert {one.found_in for one in page.decisions} == {"journal"}
            return {one.journal_id for one in page.decisions}

        eventually(holders, lambda found: len(found) == 2)
        assert sorted(next(watch).decision.packet.decision.decision_id for _ in made) == sorted(made)
        for service in both:
            page = service.ListDecisions(audit_pb2.ListDecisionsRequest(page_size=500), timeout=SECONDS)
            assert [one.packet.decision.decision_id for one in page.decisions] == sorted(made, reverse=True)
            for decision_id in made:
                service.GetDecision(audit_pb2.GetDecisionRequest(decision_id=decision_id), timeout=SECONDS)
                request = audit_pb2.ReplayDecisionRequest(decision_id=decision_id)
                assert service.ReplayDecision(request, timeout=SECONDS).equal


@pytest.mark.long
@pytest.mark.timeout(120)
def test_two_processes_never_take_different_outcomes_of_one_decision(tmp_path: Path) -> None:
    with closing(Store(f"sqlite:///{tmp_path / 'audit.db'}")) as store:
        store.migrate()  # without the tables nobody could say that there is no outcome yet
    with server_group(tmp_path, 2, **OF_BARE_SERVERS) as group, nothing_shipped(group), ExitStack() as stack:
        both = services(group, stack)
        for _ in range(10):
            decision_id = decide(int(group.env["PRETRADE_GRPC__PORT"])).decision_id
            said: dict[float, audit_pb2.RecordOutcomeResponse | grpc.StatusCode] = {}
            start = threading.Barrier(2)

            def tell(
                service: audit_pb2_grpc.AuditServiceStub,
                filled: float,
                decision_id: str = decision_id,
                said: dict[float, audit_pb2.RecordOutcomeResponse | grpc.StatusCode] = said,
                start: threading.Barrier = start,
            ) -> None:
                start.wait()
                said[filled] = record(service, decision_id, filled)

            tellers = [threading.Thread(target=tell, args=(one, float(i + 1))) for i, one in enumerate(both)]
            for teller in tellers:
                teller.start()
            for teller in tellers:
                teller.join()
            refused = [filled for filled, answer in said.items() if answer is grpc.StatusCode.ALREADY_EXISTS]
            assert len(refused) == 1, said
            (taken,) = set(said) - set(refused)
            for service in both:
                again = record(service, decision_id, taken)
                assert isinstance(again, audit_pb2.RecordOutcomeResponse)
                assert again.existed
