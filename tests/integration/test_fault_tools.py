"""The tools of the fault tests do what they say: the proxy's faults, the generator's log, the checker's verdicts."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import grpc
import psutil
import pytest
from support.harness import eventually, has_ended
from support.open_loop import LEFT, NO_RESULT, Call, Fate, LogReader, OpenLoop, Shape
from support.tcp_proxy import BLACK_HOLE, HALF_OPEN, Fault, TcpProxy

from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

PATIENCE_SECONDS = 5.0
DEADLINE_SECONDS: Final = 8.0
"""Of calls to a server that answers at once: longer than a busy machine holds it up."""
TESTS: Final = Path(__file__).parents[1]


@pytest.fixture
def echo() -> Iterator[str]:
    """Address of a server that sends back what it gets, upper case."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(opened: socket.socket) -> None:
        with opened:
            try:
                while data := opened.recv(65_536):
                    opened.sendall(data.upper())
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                opened, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(opened,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    listener.close()


@pytest.fixture
def proxy(echo: str) -> Iterator[TcpProxy]:
    with TcpProxy(echo) as opened:
        yield opened


def connect(proxy: TcpProxy, timeout: float = PATIENCE_SECONDS) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout)


def test_the_proxy_passes_bytes_on(proxy: TcpProxy) -> None:
    with connect(proxy) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"HELLO"
    assert proxy.accepted == 1
    eventually(lambda: proxy.open_links, lambda links: links == 0)


def test_latency_delays_every_byte_and_slows_down_none(proxy: TcpProxy) -> None:
    proxy.apply(Fault(latency_seconds=0.2))
    with connect(proxy) as client:
        began = time.monotonic()
        for _ in range(20):
            client.sendall(b"x")
            time.sleep(0.02)  # pieces of their own
        got = b""
        while len(got) < 20:
            got += client.recv(100)
        took = time.monotonic() - began
    assert 0.2 <= took < 0.2 * 20


@pytest.mark.parametrize("fault", [BLACK_HOLE, HALF_OPEN])
def test_held_bytes_arrive_after_the_heal(proxy: TcpProxy, fault: Fault) -> None:
    with connect(proxy) as client:
        proxy.apply(fault)
        client.sendall(b"hello")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(100)
        proxy.heal()
        client.settimeout(PATIENCE_SECONDS)
        assert client.recv(100) == b"HELLO"


def test_a_reply_is_reset_in_its_middle(proxy: TcpProxy) -> None:
    with connect(proxy) as client:
        proxy.apply(Fault(reset_replies_after=3))
        client.sendall(b"hello")
        assert client.recv(100) == b"HEL"
        with pytest.raises(ConnectionResetError):
            client.recv(100)


def test_a_reply_is_truncated_and_closed(proxy: TcpProxy) -> None:
    with connect(proxy) as client:
        proxy.apply(Fault(truncate_replies_after=3))
        client.sendall(b"hello")
        got = b""
        while data := client.recv(100):
            got += data
        assert got == b"HEL"


def test_an_end_is_passed_on_late(proxy: TcpProxy) -> None:
    proxy.apply(Fault(close_delay_seconds=0.2))
    with connect(proxy) as client:
        client.shutdown(socket.SHUT_WR)
        began = time.monotonic()
        assert client.recv(100) == b""
        assert time.monotonic() - began >= 0.2


def test_refused_connections_and_their_heal(proxy: TcpProxy) -> None:
    with connect(proxy) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"HELLO"
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            client.recv(100)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.heal()
    with connect(proxy) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"HELLO"


def test_dropped_syns_leave_a_connect_without_any_answer_until_the_heal(proxy: TcpProxy) -> None:
    proxy.drop_syns()
    with pytest.raises(TimeoutError):
        connect(proxy, 0.5)
    proxy.heal()
    with connect(proxy) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"HELLO"


def test_the_generators_log_tells_acknowledged_refused_and_unknown_apart(tmp_path: Path) -> None:
    log = tmp_path / "calls.log"
    decision = base64.b64encode(pb.Decision(order_ref="a").SerializeToString()).decode()
    log.write_text(
        f"load 0.5 1\nsent a 1.0 1.1\nsent b 2.0 2.0\nend a 1.2 OK {decision}\nend b 2.5 RESOURCE_EXHAUSTED \n"
        "sent c 3.0 3.0\nend c 3.5 DEADLINE_EXCEEDED \nsent d 4.0 4.0\nend d 4.5 O"
    )
    calls = LogReader(log).calls()
    assert [call.fate for call in calls] == [Fate.ACKNOWLEDGED, Fate.REFUSED, Fate.UNKNOWN, Fate.UNKNOWN]
    assert [call.given_up for call in calls] == [False, False, True, False]
    assert {call.deadline_seconds for call in calls} == {0.5}
    assert calls[0].latency == pytest.approx(0.2)
    assert calls[0].service_seconds == pytest.approx(0.1)


def test_a_log_that_grows_is_read_on_from_where_it_was_read_to(tmp_path: Path) -> None:
    log = tmp_path / "calls.log"
    reader = LogReader(log)
    log.write_text("load 0.5 0\nsent a 1.0 1.1\nend a 1.2 UNAV")
    (call,) = reader.calls()
    assert (call.status, reader.calls()) == ("", [call])
    with log.open("a") as file:
        file.write("AILABLE \nsent b 2.0 2.0\n")
    assert [(one.order_ref, one.status) for one in reader.calls()] == [("a", "UNAVAILABLE"), ("b", "")]


def test_a_caller_on_the_wire_never_gives_up_by_itself(tmp_path: Path) -> None:
    log = tmp_path / "calls.log"
    log.write_text("load 0.5 0\nsent a 1.0 1.0\nend a 1.5 DEADLINE_EXCEEDED \n")
    (call,) = LogReader(log).calls()
    assert not call.given_up


def number(ref: str) -> int:
    return int(ref.rpartition("-")[2])


def result(order: pb.Order) -> pb.OrderResult | None:
    """Every fourth order is refused, and every fifth gets no result."""
    if number(order.order_ref) % 4 == 0:
        return pb.OrderResult(order_ref=order.order_ref, error=pb.OrderError(code=8))
    if number(order.order_ref) % 5 == 0:
        return None
    return pb.OrderResult(order_ref=order.order_ref, decision=pb.Decision(order_ref=order.order_ref))


class Answering(decision_pb2_grpc.DecisionServiceServicer):
    def Decide(self, request: pb.DecideRequest, context: grpc.ServicerContext) -> pb.DecideResponse:
        assert 0.0 < (context.time_remaining() or 0.0) <= DEADLINE_SECONDS + 0.1
        answer = result(request.order)
        if answer is None or answer.HasField("error"):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "every fourth and fifth")
        return pb.DecideResponse(decision=answer.decision)

    def DecideBatch(self, request: pb.DecideBatchRequest, context: grpc.ServicerContext) -> pb.DecideBatchResponse:
        assert 0.0 < (context.time_remaining() or 0.0) <= DEADLINE_SECONDS + 0.1
        if number(request.orders[0].order_ref) == 17:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the second batch")
        return pb.DecideBatchResponse(results=[one for one in map(result, request.orders) if one is not None])

    def DecideStream(
        self, request_iterator: Iterator[pb.DecideStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.DecideStreamResponse]:
        for request in request_iterator:
            assert request.order.timeout.ToMilliseconds() == 1_000 * DEADLINE_SECONDS
            if (answer := result(request.order)) is not None:
                yield pb.DecideStreamResponse(result=answer)


@pytest.fixture
def answering() -> Iterator[str]:
    """Address of a server that answers at once."""
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        decision_pb2_grpc.add_DecisionServiceServicer_to_server(Answering(), server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield address
        server.stop(None).wait()


def load_of(answering: str, log: Path, orders: int, shape: Shape, on_the_wire: bool = False) -> list[Call]:
    """What the generator logs of at least so many orders."""
    with OpenLoop(
        answering, log, 200.0, ("A.SIM",), deadline_seconds=DEADLINE_SECONDS, shape=shape, on_the_wire=on_the_wire
    ) as load:
        eventually(load.calls, lambda calls: len(calls) >= orders)
    calls = load.calls()
    for call in calls:
        assert call.due <= call.sent <= call.ended
        assert call.deadline_seconds == DEADLINE_SECONDS
        assert call.decision is None or call.decision.order_ref == call.order_ref
        assert (call.decision is None) == (call.status != "OK")
    return calls


@pytest.mark.parametrize("on_the_wire", [False, True])
def test_the_generator_logs_what_became_of_every_call(answering: str, tmp_path: Path, on_the_wire: bool) -> None:
    for call in load_of(answering, tmp_path / "log", 40, "unary", on_the_wire):
        refused = number(call.order_ref) % 4 == 0 or number(call.order_ref) % 5 == 0
        assert call.status == ("RESOURCE_EXHAUSTED" if refused else "OK")


@pytest.mark.parametrize("on_the_wire", [False, True])
def test_the_generator_logs_what_became_of_every_order_of_a_batch(
    answering: str, tmp_path: Path, on_the_wire: bool
) -> None:
    calls = load_of(answering, tmp_path / "log", 64, "batch", on_the_wire)
    assert len({call.sent for call in calls[:16]}) == 1
    for call in calls:
        place = number(call.order_ref)
        if 17 <= place <= 32:
            assert call.status == "UNAVAILABLE"
        elif place % 4 == 0:
            assert call.status == "RESOURCE_EXHAUSTED"
        else:
            assert call.status == (NO_RESULT if place % 5 == 0 else "OK")


STARTS: Final = {
    "open loop": "OpenLoop({address!r}, Path({log!r}), 20.0, ('A.SIM',)).__enter__()._process",
    "on the wire": "OpenLoop({address!r}, Path({log!r}), 20.0, ('A.SIM',), on_the_wire=True).__enter__()._process",
    "flood": "flood.start(flood.Flood({address!r}, '', 600, 500, rate=20.0))",
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_generator_ends_with_the_test_run_that_started_it_however_it_ends(
    answering: str, tmp_path: Path, start: str
) -> None:
    code = "\n".join(
        (
            "import sys",
            "from support import flood",
            "from pathlib import Path",
            "from support.open_loop import OpenLoop",
            f"process = {start.format(address=answering, log=str(tmp_path / 'log'))}",
            "print(process.pid, flush=True)",
            "sys.stdin.read()",
        )
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        generator = psutil.Process(int(run.stdout.readline()))
        assert generator.is_running()
        run.kill()
    eventually(lambda: has_ended(generator), bool)


def test_the_generator_logs_what_became_of_every_order_of_a_stream(answering: str, tmp_path: Path) -> None:
    calls = load_of(answering, tmp_path / "log", 64, "stream")
    for call in calls:
        place = number(call.order_ref)
        left = (place - 1) // 16 % 2 == 1  # every second stream
        if place % 20 == 0 or place % 4 == 0:
            assert call.status in ({"RESOURCE_EXHAUSTED", LEFT} if left else {"RESOURCE_EXHAUSTED"})
        elif place % 5 == 0:
            assert call.status == (LEFT if left else NO_RESULT)
        else:
            assert call.status in ({"OK", LEFT} if left else {"OK"})
        assert call.given_up == (call.status == LEFT)
    assert any(call.status == LEFT for call in calls)
