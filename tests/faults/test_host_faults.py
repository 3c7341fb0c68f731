"""What happens around the server process: the clock jumps, the process is not given time, a replica moves."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from support.bare_server import admin_channel, is_ready
from support.harness import TOO_LONG_SECONDS, Load, Product, deciding, eventually
from support.name_server import NameServer, forwarder
from support.server_group import Callers, beside, server_environment, shipped

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack
Seen = Callable[[str], None]
_SECONDS: Final = struct.Struct("l")
OPEN, CLOSED = admin_pb2.BREAKER_STATE_OPEN, admin_pb2.BREAKER_STATE_CLOSED


@contextmanager
def server(env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server of one process that serves."""
    with (
        log.open("ab") as errors,
        subprocess.Popen([sys.executable, "-m", "server"], env=env, stderr=errors) as process,
    ):
        try:
            eventually(lambda: is_ready(int(env["PRETRADE_GRPC__PORT"])), bool)
            yield process
        finally:
            if process.poll() is None:
                process.kill()  # its shipping process ends by itself


@pytest.mark.long
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc, for a wall clock that can be moved")
@pytest.mark.fault(
    "F1", "The wall clock jumps one hour ahead, then two hours back", "Answers, deadlines and breakers work as before."
)
def test_a_wall_clock_that_jumps_changes_no_answer(product: Product, tmp_path: Path, seen: Seen) -> None:
    library, clock = tmp_path / "wall_clock.so", tmp_path / "clock"
    # libfaketime does the same and more, and hangs in Envoy, whose allocator is its own.
    compiler = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(Path(__file__).parents[1] / "wall_clock.c")]
    subprocess.run(compiler, check=True)
    clock.write_bytes(_SECONDS.pack(0))
    env = server_environment(tmp_path, **beside(product)) | {
        "LD_PRELOAD": str(library),
        "WALL_CLOCK_MOVED": str(clock),
    }
    with server(env, tmp_path / "server.log"), admin_channel(env) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        with Callers(f"127.0.0.1:{env['PRETRADE_GRPC__PORT']}", count=2) as callers:
            eventually(
                lambda: {one.source for one in callers.decisions[-20:]}, lambda found: pb.SOURCE_PRIMARY in found
            )
            force = admin_pb2.SetBreakerRequest(
                replica="challenger",
                mode=admin_pb2.BREAKER_MODE_FORCED_OPEN,
                expires_in=Duration(seconds=10),
                author="t",
                reason="t",
            )
            admin.SetBreaker(force, timeout=5.0)
            forced = time.monotonic()
            before = len(callers.decisions)
            for hours in (1, -1):
                with clock.open("r+b") as moved:  # the server has mapped it
                    moved.write(_SECONDS.pack(3_600 * hours))
                # The market's clock and the server's are one machine's.
                product.market.clock_offset_seconds = 3_600.0 * hours
                callers.wait_for_more(50)
                status = admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=5.0)
                if time.monotonic() - forced < 9:  # on a machine so busy that it took longer, this says nothing
                    assert status.replicas[2].breaker_mode == admin_pb2.BREAKER_MODE_FORCED_OPEN
            latest = max(12.0, time.monotonic() - forced + 2.0)
            eventually(
                lambda: admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=5.0).replicas[2].breaker_mode,
                lambda mode: mode == admin_pb2.BREAKER_MODE_AUTOMATIC,
            )
            lasted = time.monotonic() - forced
            assert lasted < latest
            assert [one.breaker_state for one in status.replicas[:2]] == [CLOSED, CLOSED]
            decisions = callers.decisions[before:]
            assert callers.errors == []
            # While test and server move their clocks one after the other a vector or two may look an hour old.
            sources = Counter(pb.Source.Name(one.source) for one in decisions)
            assert sources["SOURCE_NONE"] < 0.2 * len(decisions), sources
            assert sources["SOURCE_PRIMARY"] > 0.5 * len(decisions), sources
            assert all(one.budget.used_us <= one.budget.allowed_us for one in decisions)
            seen(f"{len(decisions)} calls, none failed; forced breaker of 10 s over by {lasted:.1f} s; {dict(sources)}")
        # The journal keeps few of the rows that are shipped, and at Envoy's rate those of a few seconds.
        eventually(lambda: admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=5.0).audit.unshipped, lambda n: n == 0)
    packets = list(shipped(tmp_path))
    walls = [packet.decision.decided_at.seconds for packet in packets]
    monotonic = [packet.decided_monotonic_ns for packet in packets]
    assert max(walls) - min(walls) > 7_000
    assert max(monotonic) - min(monotonic) < 120e9
    backwards = max(earlier - later for earlier, later in pairwise(monotonic))
    assert backwards < 1e9, "in order of the journal but for orders decided side by side"
    spread = (max(monotonic) - min(monotonic)) / 1e9
    seen(f"audit: wall clocks {max(walls) - min(walls)} s apart, monotonic ones {spread:.0f} s")


@pytest.mark.long
@pytest.mark.fault(
    "F2", "The server gets no CPU for more than a second, three times", "No breaker opens. Stalls are counted."
)
def test_a_standstill_of_the_server_opens_no_breaker(product: Product, seen: Seen) -> None:
    process = deciding(product.stack["server"].pid)
    opened = {name: transitions(product, name) for name in ("primary", "secondary", "challenger")}
    stalls = product.metric("pretrade_loop_stalls_total")
    with Load(product) as load:
        load.wait_for_more(200)
        for _ in range(3):
            process.suspend()
            time.sleep(TOO_LONG_SECONDS)  # the fault itself
            process.resume()
            load.wait_for_more(100)
        after = load.decisions[-50:]
    assert {name: transitions(product, name) for name in opened} == opened
    counted = product.metric("pretrade_loop_stalls_total") - stalls
    assert counted >= 3
    codes = Counter(error.code() for error in load.errors)
    assert set(codes) <= {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert codes.total() <= 3 * load.count
    assert pb.SOURCE_PRIMARY in {decision.source for decision in after}
    seen(f"{int(counted)} stalls counted; {codes.total()} of {len(load.decisions)} calls were too late")


def transitions(product: Product, replica: str) -> float:
    return product.metric("pretrade_breaker_transitions_total", replica=replica, state="open")


@pytest.mark.long
@pytest.mark.fault("F2", "Other processes take every core for 3 s", "No breaker opens. Every call is answered.")
def test_others_who_take_every_core_open_no_breaker(product: Product, seen: Seen) -> None:
    opened = {name: transitions(product, name) for name in ("primary", "secondary")}
    hog = [sys.executable, "-c", "while True: pass"]
    with Load(product, count=4) as load:
        load.wait_for_more(100)
        hogs = [subprocess.Popen(hog) for _ in range(2 * (os.cpu_count() or 1))]
        try:
            until = time.monotonic() + 3
            while time.monotonic() < until:
                load.wait_for_more(20)
            lag = product.metric("pretrade_loop_stalls_total")
        finally:
            for process in hogs:
                process.kill()
                process.wait()
        load.wait_for_more(100)
    assert {name: transitions(product, name) for name in opened} == opened
    assert not load.errors
    sources = Counter(pb.Source.Name(decision.source) for decision in load.decisions)
    seen(f"{len(load.decisions)} calls, all answered: {dict(sources)}; {int(lag)} stalls so far")


@pytest.mark.long
@pytest.mark.fault(
    "F7",
    "A replica's host name stops resolving, then resolves to another address",
    "The server reconnects. No call fails.",
)
def test_a_replica_that_moves_is_found_again(product: Product, tmp_path: Path, seen: Seen) -> None:
    primary = str(product.stack.endpoints.primary)
    with NameServer("127.0.0.2") as names, ExitStack() as old, ExitStack() as new:
        target = names.target(int(primary.rsplit(":", 1)[1]))
        env = server_environment(tmp_path, **(beside(product) | {"PRETRADE_REPLICAS__PRIMARY": target}))
        old.enter_context(forwarder("127.0.0.2", primary))
        with (
            server(env, tmp_path / "server.log"),
            Callers(f"127.0.0.1:{env['PRETRADE_GRPC__PORT']}", count=4) as callers,
        ):
            answered_by(callers, pb.SOURCE_PRIMARY)
            names.address = None
            callers.wait_for_more(100)
            answered_by(callers, pb.SOURCE_PRIMARY)  # the connection lives on
            old.close()  # nothing is left there, and the name is empty
            eventually(
                lambda: {one.source for one in callers.decisions[-20:]}, lambda found: found == {pb.SOURCE_SECONDARY}
            )
            new.enter_context(forwarder("127.0.0.3", primary))
            names.address = "127.0.0.3"
            moved = time.monotonic()
            answered_by(callers, pb.SOURCE_PRIMARY)
            seen(f"back {time.monotonic() - moved:.1f} s after the name has an address again")
            links = old.enter_context(forwarder("127.0.0.4", primary))
            names.address = "127.0.0.4"
            new.close()  # it moves in one step, so quickly perhaps that no order needs the secondary
            moved = time.monotonic()
            eventually(lambda: len(links), (2).__le__)
            callers.wait_for_more(20)
            answered_by(callers, pb.SOURCE_PRIMARY)
            seen(f"back {time.monotonic() - moved:.1f} s after moving in one step")
        seen(f"{len(callers.decisions)} calls, {len(callers.errors)} failed, {names.queries} look-ups")
        assert callers.errors == [], Counter(callers.errors)


def answered_by(callers: Callers, source: pb.Source.ValueType) -> None:
    eventually(lambda: {one.source for one in callers.decisions[-20:]}, lambda found: source in found)
