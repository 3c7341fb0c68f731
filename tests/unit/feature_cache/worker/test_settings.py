from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from feature_cache.__main__ import main
from feature_cache.described import descriptions
from feature_cache.store.l1 import FeatureCacheSettings
from feature_cache.worker.settings import PREFIX, WorkerSettings, load


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRADE_WORKER_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("PRETRADE_WORKER_TTL_SECONDS", "3")
    settings = load()
    assert (settings.redis_url.get_secret_value(), settings.ttl_seconds) == ("redis://127.0.0.1:1/0", 3.0)
    assert settings.kafka_topic == "market.events"


def test_the_help_shows_every_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["feature_cache", "--help"])
    assert main() == 0
    said = capsys.readouterr().out
    assert "PRETRADE_WORKER_REDIS_URL (default 'redis://127.0.0.1:6379/0')" in said
    assert "*****" not in said


def test_an_unknown_variable_refuses_to_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRETRADE_WORKER_REDIS_ULR", "redis://127.0.0.1:1/0")
    with pytest.raises(ValueError, match="PRETRADE_WORKER_REDIS_ULR"):
        load()
    monkeypatch.setattr("sys.argv", ["feature_cache"])
    assert main() == 2
    assert "PRETRADE_WORKER_REDIS_ULR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TTL_SECONDS", "0"),
        ("METRICS_PORT", "70000"),
        ("LOG_LEVEL", "loud"),
        ("FLUSH_INTERVAL_SECONDS", "nan"),
        ("REDIS_URL", "127.0.0.1:6379"),
        ("REDIS_URL", "redis://h:port"),
        ("REDIS_URL", "redis://h:1?max_conections=3"),
        ("REDIS_URL", "redis+cluster://"),
        ("REDIS_URL", "redis+cluster://a"),
        ("REDIS_URL", "redis+cluster://a:1,b:c"),
        ("REDIS_URL", "redis+cluster://a:1?max_conections=3"),
    ],
)
def test_a_wrong_value_refuses_to_start_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(ValidationError):
        load()
    monkeypatch.setattr("sys.argv", ["feature_cache"])
    assert main() == 2
    assert PREFIX + name in capsys.readouterr().err


@pytest.mark.parametrize("url", ["redis://me:se/cret@h:1/0", "redis+cluster://me:se/cret@a:1,b:2"])
def test_a_password_is_not_told_when_its_url_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    monkeypatch.setenv(PREFIX + "REDIS_URL", url)
    monkeypatch.setattr("sys.argv", ["feature_cache"])
    assert main() == 2
    said = capsys.readouterr().err
    assert "PRETRADE_WORKER_REDIS_URL" in said
    assert "cret" not in said


def test_urls_of_a_redis_and_of_a_cluster_are_taken() -> None:
    for url in (
        "rediss://me:pw@h/3?ssl_ca_certs=x",
        "unix:///run/redis.sock",
        "redis+cluster://me:pw@a:1,b:2?protocol=3",
    ):
        assert WorkerSettings(redis_url=SecretStr(url)).redis_url.get_secret_value() == url


def test_help_describes_every_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["feature_cache", "--help"])
    assert main() == 0
    shown = capsys.readouterr().out
    for name in WorkerSettings.model_fields:
        assert PREFIX + name.upper() in shown
        assert descriptions(WorkerSettings)[name] in shown


def test_every_setting_of_the_cache_is_described_and_none_can_be_misspelt() -> None:
    assert all(descriptions(FeatureCacheSettings)[name] for name in FeatureCacheSettings.model_fields)
    with pytest.raises(ValidationError, match="ttl_second"):
        FeatureCacheSettings.model_validate({"ttl_second": 1})


def test_a_file_of_feature_sets_that_is_wrong_refuses_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRETRADE_WORKER_FEATURES_FILE", str(tmp_path / "sets.py"))
    with pytest.raises(ValueError, match=r"sets\.py: there is no such file"):
        load()
