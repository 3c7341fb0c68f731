"""A replica that answers wrongly: cut off, malformed, out of range, of another model. Its answer is never used.

The primary is a scripted HTTP/2 peer, because TorchServe cannot be made to answer so; the secondary is real.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from support.decision_server import DecisionServer
from support.harness import ROOMY, calm_values, eventually
from support.open_loop import summary
from support.rig import OpenRig, Rig, wait_for_more
from support.scripted_peer import VERSION, PeerCall, Script, ScriptedPeer, scored

from feature_cache import features
from loadtest.generators.measurement import percentile
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack

RATE: Final = 50.0
NEVER_OPENS: Final = {"BREAKER__CONSECUTIVE_FAILURES": "1000", "BREAKER__MINIMUM_CALLS": "100000"}
"""So that every order meets the fault."""
MANY_RETRIES: Final = {"RETRY__SHARE": "1"}
PATIENT: Final = {
    "BUDGET__CAP_SECONDS": "5",
    "BATCHER__MIN_PATIENCE_SECONDS": "2",
    "BATCHER__MAX_PATIENCE_SECONDS": "2",
}
"""So that a large answer arrives before it is given up, whatever else runs here."""

Seen = Callable[[str], None]


def sound(call: PeerCall) -> None:
    call.reply(scored(call.rows))


def to_orders(script: Script) -> Script:
    """Probes get sound answers, orders what the script says."""
    return lambda call: sound(call) if call.is_probe else script(call)


@pytest.fixture
def peer() -> Iterator[ScriptedPeer]:
    with ScriptedPeer(sound) as opened:
        yield opened


def rig_with(peer: ScriptedPeer, open_rig: OpenRig, **settings: str) -> Rig:
    rig = open_rig(ROOMY | NEVER_OPENS | MANY_RETRIES | settings, endpoints={"primary": peer.address})
    rig.server.decide_until(pb.SOURCE_PRIMARY)
    return rig


def reset_in_data(call: PeerCall) -> None:
    call.half_reply(scored(call.rows))
    call.reset()


CUT: Final[dict[str, Script]] = {
    "RST_STREAM in the data": reset_in_data,
    "GOAWAY": lambda call: call.go_away(),
    "garbage frames": lambda call: call.garbage(),
    "half an answer": lambda call: call.half_reply(scored(call.rows)),
    "a connection closed without a word": lambda call: call.hang_up(),
    "no answer at all": lambda _call: None,
}


@pytest.mark.long
@pytest.mark.fault(
    "A5",
    "A replica answers with RST_STREAM, GOAWAY, garbage frames or half a message, closes or stays silent",
    "The retry answers. No call fails.",
)
def test_an_answer_that_is_cut_off_is_never_used_and_costs_no_call_its_decision(
    peer: ScriptedPeer, open_rig: OpenRig, seen: Seen
) -> None:
    rig = rig_with(peer, open_rig)
    with rig.load(RATE) as load:
        for name, cut in CUT.items():
            wanted = cut_off(rig).total() + 3
            peer.script = to_orders(cut)
            # Calls that never ended keep the primary full for the seconds that one may last: orders pass it over until
            # then, and only after that do they meet what comes next.
            eventually(lambda: cut_off(rig).total(), wanted.__le__)
            seen(f"{name}: {dict(cut_off(rig))} so far")
        peer.script = sound
        rig.server.decide_until(pb.SOURCE_PRIMARY)
    calls = load.calls()
    assert {call.status for call in calls} == {"OK"}
    assert pb.SOURCE_SECONDARY in {call.decision.source for call in calls if call.decision}
    seen(summary(calls))
    seen(rig.check())


def cut_off(rig: Rig) -> Counter[str]:
    """Batches and probes of the primary that got no whole answer, by outcome."""
    outcomes = rig.server.replica("primary").outcomes
    return Counter({outcome: outcomes[outcome] for outcome in ("transport", "timeout")})


def with_header(answer: bytes, at: int, value: bytes) -> bytes:
    return answer[:at] + value + answer[at + len(value) :]


MALFORMED: Final[dict[str, Callable[[int], bytes]]] = {
    "empty": lambda _rows: b"",
    "no header": lambda rows: scored(rows)[32:],
    "one score too few": lambda rows: scored(rows)[:-4],
    "one score too many": lambda rows: scored(rows + 1),
    "trailing bytes": lambda rows: scored(rows) + b"\0",
    "JSON": lambda _rows: b'{"scores": [0.9], "scores": [1e999], "extra": true}',
    "wrong magic": lambda rows: with_header(scored(rows), 0, b"PTS2"),
    "wrong count in the header": lambda rows: with_header(scored(rows), 4, b"\xff\xff\xff\xff"),
    "another feature set": lambda rows: with_header(scored(rows), 20, b"\0\0\0\0"),
    "a threshold of NaN": lambda rows: scored(rows, threshold=math.nan),
    "a threshold of 1.5": lambda rows: scored(rows, threshold=1.5),
    "10 MB": lambda _rows: bytes(10_000_000),
}


@pytest.mark.long
@pytest.mark.fault(
    "A6",
    "A replica's reply is malformed: empty, JSON, of a wrong shape or header, or 10 MB long",
    "The retry answers. The audit records BAD_ANSWER.",
)
def test_a_malformed_answer_is_a_bad_answer_with_its_reason_in_the_audit(
    peer: ScriptedPeer, open_rig: OpenRig, seen: Seen
) -> None:
    rig = rig_with(peer, open_rig, **PATIENT)
    for name, answer in MALFORMED.items():
        peer.script = to_orders(lambda call, answer=answer: call.reply(answer(call.rows)))  # type: ignore[misc]
        decision = rig.server.decide(deadline_seconds=5.0, order_ref=name)
        assert decision.source == pb.SOURCE_SECONDARY, name
        assert pb.DEGRADATION_PRIMARY_BAD_ANSWER in decision.degradations, name
    with rig.load(RATE, seconds=2.0) as load:
        load.wait()
    seen(f"{len(MALFORMED)} kinds, all answered by the secondary; {rig.check()}")
    attempts = attempts_by_ref(rig.server)
    assert {name: attempts[name] for name in MALFORMED} == {name: ["bad_answer", "success"] for name in MALFORMED}


@pytest.mark.fault(
    "A7", "A score is NaN, infinite or outside 0 to 1", "The retry answers. Valid edge values, such as -0.0, are used."
)
def test_a_score_outside_0_to_1_is_never_used_and_one_inside_is_whatever_it_looks_like(
    peer: ScriptedPeer, open_rig: OpenRig, seen: Seen
) -> None:
    rig = rig_with(peer, open_rig)
    for score in (math.nan, math.inf, -math.inf, 1.0000001, -0.1):
        peer.script = to_orders(lambda call, score=score: call.reply(scored(call.rows, score)))  # type: ignore[misc]
        decision = rig.server.decide(order_ref=f"bad {score}")
        assert decision.source == pb.SOURCE_SECONDARY, score
        assert pb.DEGRADATION_PRIMARY_BAD_ANSWER in decision.degradations, score
    for score in (-0.0, 1e-40, 1.0):
        peer.script = to_orders(lambda call, score=score: call.reply(scored(call.rows, score)))  # type: ignore[misc]
        decision = rig.server.decide(order_ref=f"sound {score}")
        assert decision.source == pb.SOURCE_PRIMARY, score
        assert decision.score == pytest.approx(score, abs=1e-45)
    peer.script = to_orders(lambda call: call.reply(scored(call.rows, math.nan)))
    with rig.load(RATE, seconds=2.0) as load:
        load.wait()
    assert {call.status for call in load.calls()} == {"OK"}
    seen(rig.check())


@pytest.mark.long
@pytest.mark.fault(
    "A10",
    "The primary answers with another model version than the wanted one",
    "The answer is never used (BAD_ANSWER), and the breaker opens.",
)
def test_another_model_version_than_the_one_wanted_is_never_used(
    peer: ScriptedPeer, open_rig: OpenRig, model_store: Path, seen: Seen
) -> None:
    wanted = json.loads((model_store / "champion.json").read_text())["version"]
    rig = open_rig(ROOMY | {"REPLICAS__CHAMPION_VERSION": wanted}, endpoints={"primary": peer.address})
    with rig.load(RATE, seconds=2.0) as load:
        load.wait()
    assert {call.decision.model_version for call in load.calls() if call.decision} == {wanted}
    assert rig.server.replica("primary").breaker_state != admin_pb2.BREAKER_STATE_CLOSED
    assert rig.server.metric("pretrade_replica_batches_total", replica="primary", outcome="bad_answer") > 0
    assert any(VERSION in line.get("detail", "") for line in rig.server.log("replica health")), "the log says which"
    seen(rig.check())


POISON: Final = 123.0


@pytest.mark.long
@pytest.mark.fault(
    "A8",
    "The model fails on one order in ten, on both replicas",
    "Only these orders get no model score. Breakers stay closed.",
)
def test_poison_orders_cost_only_themselves_their_score(peer: ScriptedPeer, open_rig: OpenRig, seen: Seen) -> None:
    poison = b"".join([float32(POISON)] * 2)

    def fails_on_poison(call: PeerCall) -> None:
        if poison in call.request.input["input"]:
            call.status(14, "Prediction failed\norg.pytorch.serve.job.GRPCJob")
        else:
            sound(call)

    peer.script = fails_on_poison
    with ScriptedPeer(fails_on_poison) as second:
        rig = open_rig(ROOMY, endpoints={"primary": peer.address, "secondary": second.address})
        rig.server.wait_until_well("primary", "secondary")
        values = calm_values()
        values[features.INDEX["ofi_100ms"]] = values[features.INDEX["ofi_1s"]] = POISON  # without bounds, side by side
        poisoned = pb.FeatureVector(feature_set_id=features.MF1.id, values=values.tolist())
        with rig.load(RATE) as load:
            for number in range(10):
                decision = rig.server.decide(order_ref=f"poison-{number}", features=poisoned)
                assert decision.source not in (pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY)
                wait_for_more(load, 9)
        states = {replica.breaker_state for replica in rig.server.status().replicas if replica.name != "challenger"}
        assert states == {admin_pb2.BREAKER_STATE_CLOSED}
        mates = [call.decision.source for call in load.calls() if call.decision]
        assert len(mates) == len(load.calls())
        assert set(mates) <= {pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY}
        seen(f"10 poison orders among {len(mates)}: {rig.check()}")


@pytest.mark.long
@pytest.mark.fault(
    "A12",
    "200 callers arrive while the primary's breaker is half-open and its probe hangs",
    "Only the permitted probes reach the primary. Orders are answered by the SECONDARY.",
)
def test_no_order_reaches_a_half_open_replica_and_a_stuck_probe_opens_it_again(
    peer: ScriptedPeer, open_rig: OpenRig, seen: Seen
) -> None:
    rig = open_rig(ROOMY | {"REPLICA__PROBE_TIMEOUT_SECONDS": "1"}, endpoints={"primary": peer.address})
    rig.server.decide_until(pb.SOURCE_PRIMARY)
    peer.script = lambda call: call.status(14, "Prediction failed")
    rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_OPEN)
    probes: list[bool] = []
    peer.script = lambda call: probes.append(call.is_probe)
    rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_HALF_OPEN)
    requests = [pb.DecideRequest(order=order(f"herd-{number}")) for number in range(200)]
    futures = [rig.server.decisions.Decide.future(request, timeout=5.0) for request in requests]
    decisions = [future.result().decision for future in futures]
    assert pb.SOURCE_PRIMARY not in {decision.source for decision in decisions}
    assert all(pb.DEGRADATION_PRIMARY_BREAKER_OPEN in decision.degradations for decision in decisions)
    # Permitted are two at once; the prober sends one after another, each stuck until its timeout.
    reached = len(probes)
    assert all(probes)
    assert 1 <= reached <= 2
    rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_OPEN)
    peer.script = sound
    rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_CLOSED)
    seen(f"{reached} probe and no order of 200 reached it; {rig.check()}")


@pytest.mark.long
@pytest.mark.fault(
    "A14",
    "The challenger hangs, fails every call or answers garbage",
    "No answer changes. Failed shadow rows are counted.",
)
def test_a_challenger_that_hangs_fails_or_talks_nonsense_changes_no_answer(
    peer: ScriptedPeer, open_rig: OpenRig, seen: Seen
) -> None:
    rig = open_rig(endpoints={"challenger": peer.address})
    scripts: dict[str, Script] = {
        "hangs": lambda _call: None,
        "fails": lambda call: call.status(13, "Worker died."),
        "garbage": lambda call: call.reply(bytes(range(256))),
    }
    p99s = {}
    with rig.load(RATE) as load:
        wait_for_more(load, 100)
        p99s["sound"] = percentile([call.latency for call in load.calls() if call.status], 0.99)
        for name, script in scripts.items():
            before = len(load.calls())
            peer.script = script
            rig.server.wait_for_breaker("challenger", admin_pb2.BREAKER_STATE_OPEN)
            wait_for_more(load, 100)
            p99s[name] = percentile([call.latency for call in load.calls()[before:] if call.status], 0.99)
            peer.script = sound
            rig.server.wait_for_breaker("challenger", admin_pb2.BREAKER_STATE_CLOSED)
    calls = load.calls()
    assert {call.status for call in calls} == {"OK"}
    assert {call.decision.source for call in calls if call.decision} == {pb.SOURCE_PRIMARY}
    lost = rig.server.metric("pretrade_shadow_rows_total", fate="refused")
    assert lost > 0
    seen(f"{summary(calls)}; {lost:.0f} shadow rows refused; {rig.check()}")
    seen("p99 " + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in p99s.items()))


def float32(value: float) -> bytes:
    return scored(1, value)[-4:]


def order(ref: str) -> pb.Order:
    return pb.Order(order_ref=ref, instrument="BTCUSDT.SIM", side=pb.SIDE_BUY, quantity=0.01, strategy="test")


def attempts_by_ref(server: DecisionServer) -> dict[str, list[str]]:
    return {packet.order.order_ref: [attempt.outcome for attempt in packet.attempts] for packet, _ in server.audited()}
