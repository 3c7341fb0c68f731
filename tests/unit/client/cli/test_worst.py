"""Which fault of a server is named first, and to which section of the runbook it leads."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.cli.worst import Fault, faults

Change = Callable[[pb.GetStatusResponse], object]


def sound() -> pb.GetStatusResponse:
    """A server with nothing wrong."""
    status = pb.GetStatusResponse(instance_id="one", ready=True, trading_state=pb.TRADING_STATE_ACTIVE, process_count=1)
    for name in ("primary", "secondary", "challenger"):
        status.replicas.add(
            name=name,
            role=getattr(pb, f"REPLICA_ROLE_{name.upper()}"),
            healthy=True,
            breaker_state=pb.BREAKER_STATE_CLOSED,
            breaker_mode=pb.BREAKER_MODE_AUTOMATIC,
        )
    for name in ("BTCUSDT.SIM", "ETHUSDT.SIM"):
        status.features.add(instrument=name, usable=True, worker="host:1", lag_records=3, book=pb.BOOK_STATE_VALID)
    status.flags.add(name="embedded", enabled=True)
    status.embedded.model_version = "aa" * 8
    status.audit.writable = True
    status.processes.add(index=0, ready=True, answered=True)
    return status


def worst(*changes: Change) -> Fault:
    status = sound()
    for change in changes:
        change(status)
    return faults(status)[0]


def dead(index: int) -> Change:
    def kill(status: pb.GetStatusResponse) -> None:
        status.replicas[index].healthy = False
        status.replicas[index].breaker_state = pb.BREAKER_STATE_OPEN

    return kill


def broken(index: int) -> Change:
    return lambda status: setattr(status.replicas[index], "breaker_state", pb.BREAKER_STATE_HALF_OPEN)


def held(index: int, mode: pb.BreakerMode.ValueType) -> Change:
    return lambda status: setattr(status.replicas[index], "breaker_mode", mode)


def unusable(problem: str, *indices: int, worker: str = "host:1") -> Change:
    def change(status: pb.GetStatusResponse) -> None:
        for index in indices:
            status.features[index].usable = False
            status.features[index].problem = problem
            status.features[index].worker = worker

    return change


def unhealthy(name: str, detail: str) -> Change:
    return lambda status: status.components.add(name=name, healthy=False, detail=detail)


def expired(status: pb.GetStatusResponse) -> None:
    status.champion.model_version = "bb" * 8
    status.champion.expires_in.FromSeconds(-60)


def trading(state: pb.TradingState.ValueType) -> Change:
    return lambda status: setattr(status, "trading_state", state)


def journal(error: str) -> Change:
    def change(status: pb.GetStatusResponse) -> None:
        status.audit.writable = False
        status.audit.last_error = error

    return change


def test_nothing_is_wrong_with_a_sound_server() -> None:
    assert faults(sound()) == []


@pytest.mark.parametrize(
    ("change", "what", "section"),
    [
        (journal("No space left on device"), "No space left on device", "JournalUnwritable"),
        (journal("rows that are not shipped fill all that they may, 9 MiB"), "9 MiB", "JournalFull"),
        (trading(pb.TRADING_STATE_HALTED), "trading is HALTED", "TradingHalted"),
        (trading(pb.TRADING_STATE_REDUCING), "trading is REDUCING", "TradingHalted"),
        (lambda status: setattr(status, "ready", False), "is not ready", "ServerDown"),
        (dead(0), "primary does not answer; secondary answers instead", "ReplicaDown"),
        (dead(2), "challenger does not answer; no order waits for it", "ReplicaDown"),
        (broken(0), "the breaker of primary is HALF_OPEN; secondary answers", "BreakerFlapping"),
        (held(1, pb.BREAKER_MODE_FORCED_OPEN), "secondary is held FORCED_OPEN by an operator", "ReplicaDown"),
        (held(1, pb.BREAKER_MODE_FORCED_CLOSED), "secondary is held FORCED_CLOSED", "BreakerFlapping"),
        (unusable("stale", 1), "ETHUSDT.SIM: stale", "FeaturesStale"),
        (unusable("book unknown", 1), "ETHUSDT.SIM: book unknown", "BookUnknown"),
        (unusable("stale", 0, 1), "every instrument: stale", "FeaturesStale"),
        (unusable("stale", 0, 1, worker=""), "no feature worker reports", "WorkerDown"),
        (lambda status: setattr(status.control, "stale", True), "Redis is not heard", "ControlStale"),
        (lambda status: setattr(status.control, "problem", "disk full"), "disk full", "ControlUnwritten"),
        (lambda status: setattr(status.audit, "unshipped", 10_001), "10,001 journal entries", "ShipperBehind"),
        (unhealthy("audit_store", "connection refused"), "connection refused", "ShipperFailing"),
        (unhealthy("embedded", "version aa: expired"), "version aa: expired", "EmbeddedRefused"),
        (unhealthy("explanations", "version aa is not loaded"), "version aa is not loaded", "ReaderEnding"),
        (unhealthy("certificates", "expires in 3 days"), "expires in 3 days", "CertificateExpiring"),
        (expired, "model bbbbbbbb has expired, so that orders get ABSTAIN", "ModelExpired"),
        (unhealthy("token_keys", "no key"), "no key", "CredentialsNotReplaced"),
        (lambda status: setattr(status, "process_count", 3), "2 of 3 processes do not answer", "ServerProcessDying"),
        (lambda status: setattr(status.features[0], "lag_records", 20_000), "20,000 records", "WorkerBehind"),
    ],
)
def test_each_fault_is_said_and_leads_to_its_section(change: Change, what: str, section: str) -> None:
    found = worst(change)
    assert what in found.what
    assert (found.section, found.anchor) == (section, f"docs/runbook.md#{section.lower()}")


def test_a_challenger_of_any_name_is_told_of_once() -> None:
    status = sound()
    status.replicas.add(name="retrained", role=pb.REPLICA_ROLE_CHALLENGER, healthy=False)
    unhealthy("retrained", "somewhere:1 does not answer")(status)
    assert [(fault.what, fault.section) for fault in faults(status)] == [
        ("retrained does not answer; no order waits for it", "ReplicaDown")
    ]


def test_of_several_endpoints_the_one_that_is_out_is_named_and_those_that_answer_instead() -> None:
    status = sound()
    status.replicas[0].name = "primary-1"
    status.replicas.add(name="primary-2", role=pb.REPLICA_ROLE_PRIMARY, healthy=True, ejected="does not serve model ab")
    status.replicas[-1].breaker_mode = pb.BREAKER_MODE_AUTOMATIC
    status.replicas[-1].breaker_state = pb.BREAKER_STATE_CLOSED
    unhealthy("primary", "1 of 2: primary-2: does not serve model ab")(status)
    assert [(fault.what, fault.section) for fault in faults(status)] == [
        ("primary-2 does not serve model ab; primary-1, secondary answers instead", "ReplicaDown")
    ]
    status.replicas[-1].ejected = ""
    assert not [fault for fault in faults(status) if "primary-2" in fault.what]


def test_redis_that_is_gone_is_named_and_not_the_features_that_went_stale_with_it() -> None:
    found = worst(unusable("stale", 0, 1), unhealthy("feature_cache", "Redis is not connected"))
    assert found.section == "RedisLost"


def test_a_worker_that_is_behind_is_named_as_the_cause_and_once() -> None:
    status = sound()
    unusable("stale", 0, 1)(status)
    for feature in status.features:
        feature.lag_records = 204_574
    (found,) = faults(status)
    assert found.section == "WorkerBehind"
    assert found.what.startswith("the feature worker is 204,574 records behind; every instrument: stale")


@pytest.mark.parametrize(
    "out", [(dead(0), dead(1)), (dead(0), held(1, pb.BREAKER_MODE_FORCED_OPEN)), (broken(0), broken(1))]
)
def test_without_a_champion_it_is_said_who_answers_instead(out: tuple[Change, Change]) -> None:
    with_model = worst(*out)
    assert (with_model.section, with_model.what.endswith("the embedded model answers instead")) == (
        "BothChampionsBroken",
        True,
    )
    without = worst(*out, lambda status: setattr(status.flags[0], "enabled", False))
    assert without.what.endswith("cached scores, rules or no source answer")


def with_set(status: pb.GetStatusResponse) -> None:
    """A set that a model takes, of which the worker gives one instrument's features and not the other's."""
    found = status.feature_sets.add(feature_set="numbers/1f0c83aa", models=["scalper"])
    found.computed.add(instrument="BTCUSDT.SIM", usable=True)
    found.computed.add(instrument="ETHUSDT.SIM", problem="no features")


def test_a_models_own_features_that_are_missing_are_told_where_those_of_mf1_are_there() -> None:
    found = worst(with_set)
    assert found.what == "features of numbers/1f0c83aa for ETHUSDT.SIM: no features, so that model scalper is not asked"
    assert found.section == "FeaturesOfSetMissing"
    status = sound()
    with_set(status)
    unusable("no features", 1)(status)
    assert [fault.section for fault in faults(status)] == ["FeaturesStale"], "which is the cause"


def test_what_stops_every_order_comes_before_what_stops_none() -> None:
    status = sound()
    for change in (unhealthy("audit_store", "away"), dead(2), dead(0), dead(1), unusable("stale", 0)):
        change(status)
    trading(pb.TRADING_STATE_HALTED)(status)
    journal("I/O error")(status)
    assert [fault.section for fault in faults(status)] == [
        "JournalUnwritable",
        "TradingHalted",
        "FeaturesStale",
        "BothChampionsBroken",
        "ShipperFailing",
        "ReplicaDown",
    ]


def with_scalper(status: pb.GetStatusResponse, *, champion: str = "bb" * 8, mapped: bool = True) -> None:
    """A second model, whose challenger has nothing to serve yet."""
    for name in ("primary", "secondary", "challenger"):
        status.replicas.add(
            name=f"scalper/{name}",
            role=getattr(pb, f"REPLICA_ROLE_{name.upper()}"),
            healthy=bool(champion) and name != "challenger",
            breaker_state=pb.BREAKER_STATE_CLOSED if champion else pb.BREAKER_STATE_OPEN,
            breaker_mode=pb.BREAKER_MODE_AUTOMATIC,
        )
    status.models.add(name="default", champion_version="aa" * 8)
    status.models.add(name="scalper", champion_version=champion)
    if mapped:
        status.model_map.add(instrument="*", strategy="s*", model="scalper")


def test_a_models_champions_are_told_of_beside_those_of_another() -> None:
    status = sound()
    with_scalper(status)
    assert faults(status) == []
    for index in (3, 4):
        dead(index)(status)
    (fault,) = faults(status)
    assert fault.what == (
        "neither scalper/primary nor scalper/secondary answers; cached scores, rules or no source answer"
    )
    status.models[1].embedded.model_version = "bb" * 8
    assert "the embedded model answers instead" in faults(status)[0].what
    dead(0)(status)
    assert "primary does not answer; secondary answers instead" in [one.what for one in faults(status)]


def test_a_model_without_a_champion_is_a_fault_once_it_is_given_orders() -> None:
    status = sound()
    with_scalper(status, champion="", mapped=False)
    unhealthy("scalper/primary", "nowhere does not answer soundly")(status)
    unhealthy("scalper/embedded", "no model: no champion is known yet")(status)
    assert faults(status) == []
    status.model_map.add(instrument="*", strategy="s*", model="scalper")
    assert [one.what for one in faults(status)] == [
        "model scalper has no champion, and the model map gives it orders: rules or no source answer"
    ]


def test_a_named_model_that_has_expired_is_a_fault_of_its_own() -> None:
    def expired(status: pb.GetStatusResponse) -> None:
        status.model_map.add(instrument="*", strategy="s*", model="scalper")
        status.models.add(name="default", champion_version="aa" * 8, expires_in={"seconds": -1})
        status.models.add(name="scalper", champion_version="bb" * 8, expires_in={"seconds": -1})

    found = worst(expired)
    assert (found.what, found.section) == (
        "model bbbbbbbb of scalper has expired, so that its orders get ABSTAIN",
        "ModelExpired",
    )


def test_a_model_that_the_map_gives_no_order_may_expire() -> None:
    status = sound()
    expired(status)
    status.models.add(name="scalper", champion_version="cc" * 8, expires_in={"seconds": -1})
    assert [one.what for one in faults(status)] == ["model bbbbbbbb has expired, so that orders get ABSTAIN"]
    status.model_map.add(instrument="*", strategy="*", model="slow")
    status.model_map.add(instrument="*", strategy="s*", model="scalper")
    assert faults(status) == [], "no order comes past the first rule"
