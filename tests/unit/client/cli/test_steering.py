"""What the commands that steer a server say, against a server that answers what the test wants."""

from __future__ import annotations

from concurrent import futures
from typing import Any

import grpc
import pytest
from support.admin_server import RefusedError, admin_server
from typer.testing import CliRunner, Result

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.cli.main import app


def run(address: str, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--target", address])


def replicas(_request: Any = None) -> pb.ListReplicasResponse:
    found = pb.ListReplicasResponse()
    for name in ("primary", "secondary"):
        found.replicas.add(
            name=name,
            role=getattr(pb, f"REPLICA_ROLE_{name.upper()}"),
            healthy=True,
            breaker_state=pb.BREAKER_STATE_CLOSED,
            breaker_mode=pb.BREAKER_MODE_AUTOMATIC,
        )
    return found


def test_breaker_without_arguments_shows_every_breaker_as_flag_and_state_do() -> None:
    with admin_server(ListReplicas=replicas) as server:
        every = run(server.address, "breaker")
        one = run(server.address, "breaker", "secondary")
        none = run(server.address, "breaker", "tertiary")
    assert (every.exit_code, one.exit_code, none.exit_code) == (0, 0, 2)
    assert "primary" in every.output
    assert "primary" not in one.output
    assert "CLOSED" in one.output
    assert "there are primary, secondary" in " ".join(none.output.replace("│", " ").split())


@pytest.mark.parametrize("words", [("changes", "nosuch"), ("changes", "flags/shadow")])
def test_changes_of_what_there_is_not_are_wrong_usage(words: tuple[str, ...]) -> None:
    with admin_server(ListChanges=lambda _: pb.ListChangesResponse()) as server:
        found = run(server.address, *words)
    assert found.exit_code == 2
    assert "no such subject" in found.output
    assert "trading_state, flag, breaker" in " ".join(found.output.replace("│", " ").split())


def test_no_change_of_what_there_is_says_so() -> None:
    with admin_server(ListChanges=lambda _: pb.ListChangesResponse()) as server:
        found = run(server.address, "changes", "flag/shadow", "--since", "10m")
    assert (found.exit_code, found.output) == (0, "no change of flag/shadow in the last 600 s\n")


def halted(request: pb.SetTradingStateRequest) -> pb.SetTradingStateResponse:
    change = pb.Change(subject="trading_state", diff=["trading_state: ACTIVE → HALTED"], version=4)
    return pb.SetTradingStateResponse(previous=pb.TRADING_STATE_ACTIVE, state=pb.TRADING_STATE_HALTED, change=change)


def active(_request: Any = None) -> pb.GetControlResponse:
    return pb.GetControlResponse(trading_state=pb.TRADING_STATE_ACTIVE)


def test_a_change_of_the_trading_state_is_printed_once() -> None:
    with admin_server(GetControl=active, SetTradingState=halted) as server:
        found = run(server.address, "state", "halted")
    assert found.exit_code == 0
    assert found.output.count("ACTIVE → HALTED") == 1


def test_a_halt_that_ends_by_itself_says_so() -> None:
    with admin_server(GetControl=active, SetTradingState=halted) as server:
        for_good = run(server.address, "state", "halted")
        for_a_time = run(server.address, "state", "halted", "--for", "3s")
    assert "BY THEMSELVES" not in for_good.output
    assert "Orders may trade again BY THEMSELVES after 3 s" in for_a_time.output


def test_what_is_not_confirmed_has_one_exit_code() -> None:
    with admin_server(
        GetControl=lambda _: pb.GetControlResponse(trading_state=pb.TRADING_STATE_HALTED),
        SetTradingState=lambda _: pb.SetTradingStateResponse(previous=pb.TRADING_STATE_HALTED),
        StartCanary=lambda _: pb.StartCanaryResponse(),
    ) as server:
        codes = {run(server.address, *words).exit_code for words in (("state", "active"), ("canary", "start", "aa"))}
        assert [request.dry_run for method, request in server.asked if method != "GetControl"] == [True, True]
    assert codes == {1}


def test_the_port_of_another_service_is_named_for_what_it_is() -> None:
    other = grpc.server(futures.ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        found = run(f"127.0.0.1:{port}", "state")
    finally:
        other.stop(None)
    assert found.exit_code == 3
    assert f"127.0.0.1:{port} is not the admin port" in found.output
    assert "PRETRADE_ADMIN_TARGET" in found.output
    assert "UNIMPLEMENTED" not in found.output


def test_what_a_server_cannot_do_is_not_taken_for_another_port() -> None:
    def cannot(_request: Any) -> Any:
        raise RefusedError(grpc.StatusCode.UNIMPLEMENTED, "this server has no such thing")

    with admin_server(GetControl=cannot) as server:
        found = run(server.address, "state")
    assert (found.exit_code, found.output) == (1, "UNIMPLEMENTED: this server has no such thing\n")
