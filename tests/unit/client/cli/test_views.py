"""What a terminal shows of a server's status."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration
from rich.console import Console, RenderableType

from pretrade.admin.v1 import admin_pb2
from pretrade.client.cli.views import (
    canary_view,
    change_table,
    replica_table,
    restriction_table,
    status_view,
)

DETAIL = "it orders 91.0% of the pairs of rows otherwise than the champion, and 9.0% alike: WORSE (40 samples)"
REASON = "retrained [/] on [red]November[/] data"


def shown(view: RenderableType, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


def canary() -> admin_pb2.Canary:
    check = admin_pb2.CanaryCheck(name="rank", limit=0.0, samples=40, canary=0.91, champion=0.09, detail=DETAIL)
    check.verdict = admin_pb2.CANARY_VERDICT_WORSE
    return admin_pb2.Canary(
        model_version="bb" * 8,
        champion_version="aa" * 8,
        state=admin_pb2.CANARY_STATE_RUNNING,
        weight=0.05,
        steps=[0.01, 0.05, 1.0],
        step=1,
        author="ann",
        reason=REASON,
        verdict=admin_pb2.CANARY_VERDICT_WORSE,
        verdict_reason="rank 0.91 against 0.09",
        checks=[check],
    )


def test_the_status_shows_the_canary_with_its_evidence() -> None:
    status = admin_pb2.GetStatusResponse(instance_id="one", ready=True, trading_state=admin_pb2.TRADING_STATE_ACTIVE)
    assert "canary" not in shown(status_view(status))
    status.canary.CopyFrom(canary())
    text = shown(status_view(status))
    assert "5% of the flows" in text
    assert "rank 0.91 against 0.09" in text
    assert f"rank  {DETAIL}" in text


@pytest.mark.parametrize(
    ("flows", "of_its_own", "said"),
    [
        (0, 0, "no order has come to this process since it began"),
        (4, 0, "5% of 4 flows is no flow: it gets no orders in this process, and no evidence"),
        (4, 1, "1 of the 4 flows that this process saw are its own"),
    ],
)
def test_a_share_into_which_no_flow_falls_is_called_that(flows: int, of_its_own: int, said: str) -> None:
    running = canary()
    running.flows, running.canary_flows = flows, of_its_own
    assert said in shown(canary_view(running))
    running.state = admin_pb2.CANARY_STATE_ABORTED
    assert "flows" not in shown(canary_view(running))


def test_the_status_says_which_model_is_embedded_or_why_none_is() -> None:
    status = admin_pb2.GetStatusResponse(instance_id="one", trading_state=admin_pb2.TRADING_STATE_ACTIVE)
    status.embedded.problem = "no model: this server has no model store"
    assert "embedded  no model: this server has no model store" in shown(status_view(status))
    status.embedded.problem, status.embedded.model_version = "", "aa" * 8
    assert f"embedded  model {'aa' * 8}" in shown(status_view(status))


def test_what_people_and_errors_say_is_shown_as_it_is() -> None:
    status = admin_pb2.GetStatusResponse(instance_id="one", trading_state=admin_pb2.TRADING_STATE_HALTED)
    status.components.add(name="journal", healthy=False, detail="[/dev/sdb1] is full")
    status.audit.last_error = "[/var/lib] is read-only"
    text = shown(status_view(status))
    assert "[/dev/sdb1] is full" in text
    assert "[/var/lib] is read-only" in text
    assert REASON in shown(canary_view(canary()))


def incident() -> admin_pb2.GetStatusResponse:
    """A server with something wrong wherever something can be, and long figures."""
    status = admin_pb2.GetStatusResponse(
        instance_id="server-0.pretrade.svc.cluster.local:31415",
        trading_state=admin_pb2.TRADING_STATE_REDUCING,
        control_version=987654,
        process_count=4,
        chain_stages=["model", "embedded", "cached_score", "rules"],
        uptime=Duration(seconds=1_234_567),
    )
    modes = (admin_pb2.BREAKER_MODE_AUTOMATIC, admin_pb2.BREAKER_MODE_FORCED_OPEN, admin_pb2.BREAKER_MODE_METRICS_ONLY)
    for number, (name, mode) in enumerate(zip(("primary", "secondary", "challenger"), modes, strict=True)):
        status.replicas.add(
            name=name,
            role=getattr(admin_pb2, f"REPLICA_ROLE_{name.upper()}"),
            breaker_state=admin_pb2.BREAKER_STATE_HALF_OPEN,
            breaker_mode=mode,
            reverts_in=None if number == 0 else Duration(seconds=3_598),
            in_flight=1_000 + number,
            abandoned=70 + number,
            queued=4_000 + number,
            p50=Duration(nanos=123_450_000 + number * 10_000),
            p99=Duration(seconds=1, nanos=43_320_000 + number * 10_000),
            rows=123_456_780 + number,
            model_version=f"{number}d92e6114bf9cde3",
        )
        status.features.add(
            instrument=f"BTCUSDT{number}.BINANCE-USDM",
            problem="book unknown",
            age=Duration(seconds=61, nanos=550_000_000 + number * 10_000),
            book=admin_pb2.BOOK_STATE_UNKNOWN,
            book_reason="time ran back",
            lag_records=44_444_440 + number,
            worker=f"worker-7d9f8b6c5-abcd{number}:1",
            vector_version=f"mf{number}/5c6f81d2",
            sequence=9_876_543_210 + number,
            book_losses=800 + number,
        )
        status.processes.add(
            index=number, uptime=Duration(seconds=70_000 + number), decisions=55_500 + number, unshipped=660 + number
        )
        status.flags.add(name=("shadow", "cached_score", "embedded")[number], enabled=bool(number))
        status.sources.add(source=("PRIMARY", "SECONDARY", "CACHED_SCORE")[number], decisions=7_654_320 + number)
    status.components.add(name="audit_store", healthy=False, detail="connection to 10.0.0.1, port 5432 refused")
    status.audit.last_error = "[Errno 28] No space left on device"
    status.audit.written, status.audit.unshipped = 31_415_926, 27_182
    status.embedded.problem = "no model: version aa: expired"
    status.drift.model_version, status.drift.rows = "ab" * 8, 1_618
    status.drift.features.add(name="book_age_ms", psi=6.17, limit=0.05, drifted=True)
    return status


STATES = (
    *("REDUCING", "HALF_OPEN", "FORCED_OPEN", "METRICS_ONLY", "3598", "unknown:", "expired", "refused", "1234567"),
    *("987654", "1000", "1001", "1002", "(70", "(72", "4000", "4002", "123.45", "123.47", "1043.32", "1043.34"),
    *("123456780", "123456782", "0d92e611", "2d92e611", "BTCUSDT0.BINANCE-USDM", "BTCUSDT2.BINANCE-USDM", "book"),
    *("61550.00", "61550.02", "44,444,440", "44,444,442", "800", "802", "7654320", "7654322", "31415926", "27182"),
    *("70000", "70002", "55500", "55502", "660", "662", "1,618", "6.17", "docs/runbook.md#journalunwritable"),
    *("cached_score", "ShipperFailing", "BothChampionsBroken", "5432"),
)
"""Words of the incident's states and figures: all of them have to be there."""
WIDE = ("mf0/5c6f81d2", "9876543210", "worker-7d9f8b6c5-abcd2:1")


def missing(words: tuple[str, ...], view: RenderableType, width: int) -> list[str]:
    text = shown(view, width)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    there = {piece for word in text.split() for piece in (word, word.rstrip(":;,)"), f"{word.rstrip(':;,)')}:")}
    return [word for word in words if word not in there]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_status_of_an_incident_is_whole_at_any_width(width: int) -> None:
    assert missing(STATES, status_view(incident()), width) == []


@pytest.mark.parametrize("width", [60, 80, 120])
def test_vectors_and_workers_are_shown_to_who_asks_for_them(width: int) -> None:
    assert missing(WIDE, status_view(incident()), width) == list(WIDE)
    assert missing(STATES + WIDE, status_view(incident(), wide=True), width) == []


def test_the_first_line_is_the_worst_thing() -> None:
    assert shown(status_view(incident()), 80).startswith("worst thing now:  the audit journal takes no rows")
    assert shown(status_view(admin_pb2.GetStatusResponse())).startswith("worst thing now:")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_changes_restrictions_and_canaries_are_whole_at_any_width(width: int) -> None:
    change = admin_pb2.Change(
        version=76, diff=["flag/shadow: on → off for 600 s", "then on"], author="ann", reason="why"
    )
    assert missing(("76", "600", "then", "ann", "why"), change_table([change]), width) == []
    identifier = "0193c0de-0000-7000-8000-000000000000"
    restriction = admin_pb2.Restriction(change_id=identifier, state=admin_pb2.TRADING_STATE_HALTED, author="ben")
    assert missing(("HALTED", "ben", identifier), restriction_table([restriction]), width) == []
    assert missing(("bb" * 8, "RUNNING", "91.0%", "9.0%", "WORSE", "(40"), canary_view(canary()), width) == []
    assert missing(("FORCED_OPEN", "1043.33"), replica_table(incident().replicas), width) == []


def test_the_status_says_how_good_the_champion_is_known_to_be() -> None:
    status = admin_pb2.GetStatusResponse(instance_id="one", trading_state=admin_pb2.TRADING_STATE_ACTIVE)
    assert "champion" not in shown(status_view(status))
    status.champion.model_version, status.champion.standing = "aa" * 8, "does not beat the rules"
    status.champion.card = "models/cards/card.md"
    assert "champion aaaaaaaa: does not beat the rules; card: models/cards/card.md" in shown(status_view(status))


def test_the_status_has_a_line_for_each_feature_set_that_models_take() -> None:
    status = admin_pb2.GetStatusResponse()
    assert "feature set" not in shown(status_view(status))
    first = status.feature_sets.add(feature_set="numbers/1f0c83aa", models=["default", "scalper"])
    first.computed.add(instrument="A.SIM", usable=True, age={"nanos": 250_000_000})
    first.computed.add(instrument="B.SIM", problem="no features")
    first.missing.add(part="caller", orders=1_200)
    status.feature_sets.add(feature_set="tide/3b2c1d0e", models=["tide"])
    text = shown(status_view(status))
    (line,) = (one for one in text.splitlines() if one.startswith("numbers/"))
    for part in ("default, scalper", "B.SIM no features", "250.00", "1,200 (caller)"):
        assert part in line
    (line,) = (one for one in text.splitlines() if one.startswith("tide/"))
    assert "none are computed" in line


def test_the_status_says_of_each_model_when_it_expires_and_whether_its_inputs_have_drifted() -> None:
    status = admin_pb2.GetStatusResponse()
    status.models.add(name="default", champion_version="aa" * 8, expires_in={"seconds": 86_400})
    named = status.models.add(
        name="scalper", champion_version="bb" * 8, available=True, expires_in={"seconds": -86_400}
    )
    named.drift.model_version, named.drift.rows = "bb" * 8, 900
    named.drift.features.add(name="ofi_1s", psi=0.9, limit=0.1, drifted=True)
    status.models.add(name="new", drift={"problem": "it has no champion yet"})
    text = shown(status_view(status))
    (line,) = (one for one in text.splitlines() if one.startswith("model scalper"))
    assert "bb" * 8 in line
    assert "expired 1.0 days ago: its answers are ABSTAIN" in line
    assert "drift in 900 inputs of model bbbbbbbb: ofi_1s 0.90 (limit 0.10)" in text
    assert "no champion yet" not in text, "it says so by its name already"
