"""What a form asks for, and what it may do to trading."""

from __future__ import annotations

import pytest

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.console.acts import ACTS, Known, replica_names
from pretrade.console.forms import FormError


def known(state: pb.TradingState.ValueType = pb.TRADING_STATE_ACTIVE, *healthy: str) -> Known:
    replicas = [
        pb.ReplicaStatus(
            name=name,
            role=pb.REPLICA_ROLE_PRIMARY if "primary" in name else pb.REPLICA_ROLE_SECONDARY,
            healthy=name in healthy,
            breaker_mode=pb.BREAKER_MODE_AUTOMATIC,
            breaker_state=pb.BREAKER_STATE_CLOSED,
        )
        for name in ("primary", "secondary")
    ]
    return Known(pb.GetStatusResponse(replicas=replicas), pb.GetControlResponse(trading_state=state))


def test_stopping_trade_waits_for_nobody_and_everything_else_is_made_as_shown() -> None:
    act = ACTS["trading_state"]
    halt = act.complete({"state": "halted", "reason": "x"}, "ann")
    active = act.complete({"state": "active", "reason": "x"}, "ann")
    assert not act.is_bound(halt, pb.TRADING_STATE_ACTIVE)
    assert not act.is_bound(halt, pb.TRADING_STATE_REDUCING)
    assert act.is_bound(active, pb.TRADING_STATE_HALTED)
    assert ACTS["flag"].is_bound(pb.SetFlagRequest(), pb.TRADING_STATE_ACTIVE)


def test_a_request_says_who_why_and_for_how_long() -> None:
    form = {"state": "halted", "reason": " incident ", "span": "10m", "lift": "id-1"}
    request = ACTS["trading_state"].complete(form, "ann")
    assert (request.author, request.reason, request.expires_in.seconds) == ("ann", "incident", 600)
    assert list(request.lifts) == ["id-1"]
    assert not request.HasField("expected_control_version")
    assert not ACTS["trading_state"].complete({"state": "halted"}, "ann").HasField("expires_in")


def test_an_act_that_cannot_end_by_itself_ignores_a_span() -> None:
    assert ACTS["resume"].complete({"replica": "primary", "span": "10m"}, "ann") == pb.ResumeReplicaRequest(
        replica="primary", author="ann"
    )


@pytest.mark.parametrize(
    ("state", "form", "risk"),
    [
        (pb.TRADING_STATE_HALTED, {"state": "active"}, "Orders may trade again."),
        (pb.TRADING_STATE_HALTED, {"state": "reducing"}, "Orders may trade again."),
        (pb.TRADING_STATE_ACTIVE, {"state": "halted"}, ""),
        (pb.TRADING_STATE_ACTIVE, {"state": "halted", "span": "5m"}, "BY THEMSELVES after 5m"),
        (pb.TRADING_STATE_ACTIVE, {"state": "nonsense"}, ""),
    ],
)
def test_whoever_may_let_orders_trade_is_told(
    state: pb.TradingState.ValueType, form: dict[str, str], risk: str
) -> None:
    said = ACTS["trading_state"].risk(form, known(state))
    assert risk in said
    assert bool(risk) == bool(said)


def test_whoever_takes_the_last_champion_out_is_told() -> None:
    both, one = known(pb.TRADING_STATE_ACTIVE, "primary", "secondary"), known(pb.TRADING_STATE_ACTIVE, "primary")
    assert not ACTS["drain"].risk({"replica": "primary"}, both)
    assert "No champion is left" in ACTS["drain"].risk({"replica": "primary"}, one)
    assert "No champion is left" in ACTS["breaker"].risk({"replica": "primary", "mode": "forced_open"}, one)
    assert not ACTS["breaker"].risk({"replica": "primary", "mode": "automatic"}, one)
    assert "every order" in ACTS["breaker"].risk({"replica": "secondary", "mode": "forced_closed"}, both)


@pytest.mark.parametrize(
    ("act", "form", "said"),
    [
        ("chain", {"stage0": "rules", "stage1": "rules"}, "at most once"),
        ("chain", {"stage0": "luck"}, "The stages are"),
        ("flag", {"flag": "shadow", "value": "maybe"}, "Value: one of on, off"),
        ("canary_weight", {"percent": "nan", "hold": "yes"}, "0 to 100"),
        ("canary_weight", {"percent": "101", "hold": "yes"}, "0 to 100"),
        ("canary_weight", {"percent": "", "hold": "yes"}, "0 to 100"),
        ("drain", {"replica": " "}, "one must be chosen"),
    ],
)
def test_a_form_that_makes_no_sense_says_which_field(act: str, form: dict[str, str], said: str) -> None:
    with pytest.raises(FormError, match=said):
        ACTS[act].complete(form, "ann")


def test_the_chain_leaves_out_what_is_not_chosen() -> None:
    assert list(ACTS["chain"].request({"stage0": "rules", "stage1": "", "stage2": "model"}).stages) == [
        "rules",
        "model",
    ]


def test_a_canarys_share_is_given_in_percent() -> None:
    assert ACTS["canary_weight"].request({"percent": "12.5", "hold": "no"}).weight == 0.125


def test_a_role_with_several_endpoints_is_offered_as_a_whole_too() -> None:
    replicas = [
        pb.ReplicaStatus(name=name, role=pb.REPLICA_ROLE_PRIMARY if "primary" in name else pb.REPLICA_ROLE_SECONDARY)
        for name in ("primary-1", "primary-2", "secondary", "scalper/primary")
    ]
    assert replica_names(replicas) == ["primary", "primary-1", "primary-2", "secondary", "scalper/primary"]


def test_every_act_has_a_method_of_the_contract() -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["AdminService"].methods}
    assert {act.method for act in ACTS.values()} <= methods


def test_a_canary_is_begun_as_the_form_says() -> None:
    form = {"model_version": "ab" * 8, "steps": "5, 25% 100", "instrument": " BTC* ", "reason": "better"}
    made = ACTS["canary_start"].complete(form, "ann")
    assert (made.model_version, list(made.steps)) == ("ab" * 8, [0.05, 0.25, 1.0])
    assert (made.instrument, made.strategy, made.author) == ("BTC*", "", "ann")
    assert not ACTS["canary_start"].complete({"model_version": "ab" * 8}, "ann").steps, "those of the server's settings"
    assert ACTS["canary_start"].is_bound(made, pb.TRADING_STATE_ACTIVE)


def test_what_is_no_part_of_the_control_state_is_bound_to_no_version_of_it() -> None:
    load = ACTS["model_load"].complete({"model_version": "ab" * 8, "replica": "challenger"}, "ann")
    assert list(load.replicas) == ["challenger"]
    assert not ACTS["model_load"].is_bound(load, pb.TRADING_STATE_ACTIVE)
    alias = ACTS["model_alias"].complete({"model_version": "ab" * 8, "alias": "previous"}, "ann")
    assert ACTS["model_alias"].is_bound(alias, pb.TRADING_STATE_ACTIVE)


@pytest.mark.parametrize(
    ("alias", "risk"), [("champion", "Another model then decides"), ("challenger", ""), ("previous", "")]
)
def test_whoever_moves_the_champions_alias_is_told_what_that_is(alias: str, risk: str) -> None:
    assert risk in ACTS["model_alias"].risk({"alias": alias}, known())
    assert bool(risk) == bool(ACTS["model_alias"].risk({"alias": alias}, known()))


@pytest.mark.parametrize(
    ("act", "form", "said"),
    [
        ("canary_start", {}, "Model version: one must be chosen"),
        ("canary_start", {"model_version": "x", "steps": "five"}, "Steps: numbers of percent"),
        ("model_alias", {"model_version": "x", "alias": "candidate"}, "Alias: one of champion, challenger, previous"),
    ],
)
def test_a_form_about_a_version_that_makes_no_sense_says_which_field(act: str, form: dict[str, str], said: str) -> None:
    with pytest.raises(FormError, match=said):
        ACTS[act].complete({**form, "reason": "x"}, "ann")
