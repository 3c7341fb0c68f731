"""What breaks while orders come densely, so that they are decided in columns, by each of the three ways in.

Other files break the same things under single calls that come one by one, and look at more of what follows. Here the
same load comes as bursts of single calls, as batches and on streams, and the same promises hold for all of them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
import sqlalchemy as sa
from support.harness import EDGE, ROOMY, TOO_LONG_SECONDS, eventually
from support.open_loop import LEFT, Call, OpenLoop, Shape, summary
from support.rig import OpenRig, Rig, heal, wait_for_more
from support.scripted_peer import ScriptedPeer, scored
from support.tcp_proxy import BLACK_HOLE, Fault, TcpProxy

from pretrade.admin.v1 import admin_pb2
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(400)]  # model servers start anew

RATE: Final = 128.0
"""Orders a second: what makes them dense is how many come at once. A busy machine must not decide what is seen here."""
TOGETHER: Final = 64
AT_ONCE: Final = 32
DENSE: Final = 10
"""Orders of an average block, at least."""
NEVER_OPENS: Final = {
    "BREAKER__CONSECUTIVE_FAILURES": "1000",
    "BREAKER__MINIMUM_CALLS": "100000",
    "RETRY__SHARE": "1",
}
"""So that every order meets the fault."""
ROOM: Final = {"ADMISSION__MAX_IN_FLIGHT": "4096", "ADMISSION__MIN_IN_FLIGHT": "4096"}
"""So that nothing is refused on a machine that is busy: this is not about too many orders."""
SMALL_JOURNAL: Final = {"JOURNAL__MAX_MEBIBYTES": "1"}
OPEN, CLOSED = admin_pb2.BREAKER_STATE_OPEN, admin_pb2.BREAKER_STATE_CLOSED
PRIMARY, SECONDARY = pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY

Seen = Callable[[str], None]


@dataclass
class Scene:
    """A rig under load, and what stands beside it."""

    rig: Rig
    load: OpenLoop
    peer: ScriptedPeer
    database: TcpProxy

    def answered(self, since: int) -> Counter[pb.Source.ValueType]:
        """By whom the orders were answered that left after so many others."""
        return Counter(call.decision.source for call in self.load.calls()[since:] if call.decision)

    def until(self, holds: Callable[[list[pb.Decision]], Any]) -> None:
        """Waits until something holds of the decisions of orders that leave from now on."""
        since = len(self.load.calls())
        eventually(lambda: [call.decision for call in self.load.calls()[since:] if call.decision], holds)

    def by(self, *sources: pb.Source.ValueType) -> None:
        """Waits until fifty orders in a row have been answered by these alone."""
        self.until(lambda found: len(found) > 50 and {one.source for one in found[-50:]} <= set(sources))


Break = Callable[[Scene], None]


def killed_primary(scene: Scene) -> None:
    server, replicas = scene.rig.server, scene.rig.stack
    replicas["primary"].kill()
    server.wait_for_breaker("primary", OPEN)
    scene.by(SECONDARY)
    replicas.restart("primary")
    server.wait_for_breaker("primary", CLOSED)


def hung_primary(scene: Scene) -> None:
    server, replica = scene.rig.server, scene.rig.stack["primary"]
    replica.pause()
    server.wait_for_breaker("primary", OPEN)
    scene.by(SECONDARY)
    replica.resume()
    server.wait_for_breaker("primary", CLOSED)


def cut_replies(scene: Scene) -> None:
    server, proxy = scene.rig.server, scene.rig.proxies["primary"]
    for fault in (Fault(reset_replies_after=20), Fault(truncate_replies_after=20)):
        wanted = server.replica("primary").outcomes["transport"] + 3
        proxy.apply(fault)
        eventually(lambda: server.replica("primary").outcomes["transport"], wanted.__le__)
        proxy.heal()


def unusable_scores(scene: Scene) -> None:
    for score in (math.nan, math.inf, 1.0000001, -0.1):
        since = len(scene.load.calls())
        scene.peer.script = lambda call, score=score: call.reply(scored(call.rows, score))  # type: ignore[misc]
        scene.by(SECONDARY)
        bad = [one for one in decisions(scene.load.calls()[since:]) if one.source == SECONDARY]
        assert any(pb.DEGRADATION_PRIMARY_BAD_ANSWER in one.degradations for one in bad), score
        scene.peer.script = lambda call: call.reply(scored(call.rows))
        scene.by(PRIMARY)


def no_champions(scene: Scene) -> None:
    server, replicas = scene.rig.server, scene.rig.stack
    for name in ("primary", "secondary"):
        replicas[name].kill()
    scene.by(pb.SOURCE_RULES)
    heal(replicas)
    for name in ("primary", "secondary"):
        server.wait_for_breaker(name, CLOSED)


def frozen_redis(scene: Scene) -> None:
    scene.rig.stack["valkey"].pause()
    try:
        scene.until(lambda found: any(pb.REASON_CODE_FEATURES_STALE in one.reasons for one in found))
        scene.by(pb.SOURCE_NONE)
    finally:
        scene.rig.stack["valkey"].resume()


def silent_market(scene: Scene) -> None:
    scene.rig.market.pause()
    scene.by(pb.SOURCE_NONE)
    scene.rig.market.resume()


def lost_database(scene: Scene) -> None:
    server = scene.rig.server
    scene.database.apply(BLACK_HOLE)
    eventually(lambda: server.status().audit.unshipped, lambda commits: commits > 30)
    scene.by(PRIMARY)
    scene.database.heal()


def full_journal(scene: Scene) -> None:
    scene.database.apply(BLACK_HOLE)
    scene.until(lambda found: any(pb.REASON_CODE_AUDIT_UNAVAILABLE in one.reasons for one in found))
    scene.until(lambda found: len(found) > 50 and {one.action for one in found[-50:]} == {pb.ACTION_ABSTAIN})
    scene.database.heal()
    scene.until(lambda found: any(pb.REASON_CODE_AUDIT_UNAVAILABLE not in one.reasons for one in found))


def standstills(scene: Scene) -> None:
    server = scene.rig.server
    stalls = server.metric("pretrade_loop_stalls_total")
    for _ in range(3):
        server.process.suspend()
        time.sleep(TOO_LONG_SECONDS)  # the fault itself
        server.process.resume()
        wait_for_more(scene.load, 100)
    assert server.metric("pretrade_loop_stalls_total") - stalls >= 3
    assert not server.log("breaker")


@dataclass(frozen=True)
class Broken:
    """What is broken, and who may answer from its beginning to its end."""

    break_and_heal: Break
    sources: frozenset[pb.Source.ValueType]
    settings: Mapping[str, str] = field(default_factory=dict)
    proxied: tuple[str, ...] = ()
    scripted: bool = False
    """Whether the primary is a peer that answers as the test says."""


MODELS: Final = frozenset({PRIMARY, SECONDARY})
WITHOUT_MODEL: Final = MODELS | {pb.SOURCE_CACHED_SCORE, pb.SOURCE_RULES}
OR_NOBODY: Final = MODELS | {pb.SOURCE_NONE}
WAYS: Final[Mapping[str, tuple[Shape, Mapping[str, Any]]]] = {
    "single calls": ("unary", {"at_once": AT_ONCE, "on_the_wire": True}),
    "batches": ("batch", {"together": TOGETHER, "on_the_wire": True}),
    "streams": ("stream", {"together": TOGETHER, "at_once": AT_ONCE}),
}


@contextmanager
def scene_of(broken: Broken, way: str, open_rig: OpenRig, database_url: str) -> Iterator[Scene]:
    """The rig that a fault needs, under a load of this kind."""
    shape, dense = WAYS[way]
    url = sa.make_url(database_url)
    with ExitStack() as opened:
        peer = opened.enter_context(ScriptedPeer(lambda call: call.reply(scored(call.rows))))
        database = opened.enter_context(TcpProxy(f"{url.host}:{url.port}"))
        host, _, port = database.address.rpartition(":")
        rig = open_rig(
            {**ROOMY, **ROOM, **broken.settings},
            proxied=broken.proxied,
            endpoints={"primary": peer.address} if broken.scripted else None,
            database_url=url.set(host=host, port=int(port)).render_as_string(hide_password=False),
        )
        rig.server.decide_until(PRIMARY)
        yield Scene(rig, opened.enter_context(rig.load(RATE, shape=shape, **dense)), peer, database)


def decisions(calls: list[Call]) -> list[pb.Decision]:
    return [call.decision for call in calls if call.decision]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(
            Broken(killed_primary, WITHOUT_MODEL),
            id="killed primary",
            marks=pytest.mark.fault(
                "A1",
                "The primary is killed under dense orders, by each way in",
                "Every order is decided, by SECONDARY.",
            ),
        ),
        pytest.param(
            Broken(hung_primary, WITHOUT_MODEL),
            id="hung primary",
            marks=pytest.mark.fault(
                "A2",
                "The primary hangs under dense orders, by each way in",
                "Every order is decided: by SECONDARY, or by the rest of the chain while retries are used up.",
            ),
        ),
        pytest.param(
            Broken(cut_replies, MODELS, NEVER_OPENS, proxied=("primary",)),
            id="cut replies",
            marks=pytest.mark.fault(
                "A5",
                "Replies of the primary are reset or cut off under dense orders, by each way in",
                "Every order is decided, by the retry. No partial score is used.",
            ),
        ),
        pytest.param(
            Broken(unusable_scores, MODELS, NEVER_OPENS, scripted=True),
            id="unusable scores",
            marks=pytest.mark.fault(
                "A7",
                "Scores are NaN, infinite or outside 0 to 1 under dense orders, by each way in",
                "Every order is decided, by the retry.",
            ),
        ),
        pytest.param(
            Broken(no_champions, WITHOUT_MODEL),
            id="no champions",
            marks=pytest.mark.fault(
                "A11",
                "Both champions are killed under dense orders, by each way in, without an embedded model",
                "Every order is decided, by CACHED_SCORE, then by RULES.",
            ),
        ),
        pytest.param(
            Broken(frozen_redis, OR_NOBODY),
            id="frozen Redis",
            marks=pytest.mark.fault(
                "B1", "Redis hangs under dense orders, by each way in", "ABSTAIN once features are stale. It recovers."
            ),
        ),
        pytest.param(
            Broken(silent_market, OR_NOBODY),
            id="silent market",
            marks=pytest.mark.fault(
                "C7", "Features stop under dense orders, by each way in", "ABSTAIN once they are stale. It recovers."
            ),
        ),
        pytest.param(
            Broken(lost_database, MODELS),
            id="lost database",
            marks=pytest.mark.fault(
                "D1",
                "PostgreSQL is black-holed under dense orders, by each way in",
                "Decisions go on. Every row is shipped later, once.",
            ),
        ),
        pytest.param(
            Broken(full_journal, OR_NOBODY | WITHOUT_MODEL, SMALL_JOURNAL),
            id="full journal",
            marks=pytest.mark.fault(
                "D3",
                "The journal is full under dense orders, by each way in",
                "ABSTAIN, and decisions again once rows are shipped.",
            ),
        ),
        pytest.param(
            # One batch that was slow, or given up, would open a breaker.
            Broken(standstills, MODELS, {"BREAKER__CONSECUTIVE_FAILURES": "1"}),
            id="standstills",
            marks=pytest.mark.fault(
                "F2",
                "The server gets no CPU for more than a second, three times, under dense orders, by each way in",
                "No breaker opens. Every order is decided.",
            ),
        ),
    ],
)
def test_a_fault_costs_no_order_its_decision_whichever_way_it_comes(
    broken: Broken, way: str, open_rig: OpenRig, database_url: str, seen: Seen
) -> None:
    if way == "single calls" and EDGE == "grpcio":
        pytest.skip(
            "on a busy machine grpc.aio lets some of a burst of single calls pass their deadline: not understood"
        )
    with scene_of(broken, way, open_rig, database_url) as scene:
        rig, load = scene.rig, scene.load
        wait_for_more(load, 300)
        orders, number = eventually(lambda: in_columns(rig), lambda found: found[0] >= DENSE * found[1] > 0)
        broken.break_and_heal(scene)
        scene.by(PRIMARY)
        load.stop()
        calls, after = load.calls(), in_columns(rig)
        allowed = {"OK", LEFT} if way == "streams" else {"OK"}
        assert {call.status for call in calls} <= allowed, summary(calls)
        assert {one.source for one in decisions(calls)} <= broken.sources, summary(calls)
        assert after[0] > orders, f"decided in columns again, as {orders:.0f} orders in {number:.0f} blocks were before"
        checked = rig.check()
        sources = ", ".join(
            f"{enum_name(pb.Source, source)} {count}" for source, count in scene.answered(0).most_common()
        )
        seen(f"{way} on {EDGE}: {sources}; {after[0]:.0f} orders in {after[1]:.0f} blocks; {checked}")


def in_columns(rig: Rig) -> tuple[float, float]:
    """Orders that were decided in columns, and in how many blocks."""
    metric = rig.server.metric
    return metric("pretrade_block_orders_sum"), metric("pretrade_block_orders_count")
