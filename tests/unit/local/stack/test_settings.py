"""What a user can ask of the embedded stack, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from feature_cache.described import descriptions
from feature_cache.sources.session import SessionError
from local.stack.settings import LocalSettings, refuse_unknown_variables, secret, wrong_settings
from local.stack.stack import Stack


def test_the_environment_sets_what_the_command_line_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRADE_LOCAL_SPEED", "10")
    monkeypatch.setenv("PRETRADE_LOCAL_DIR", "/elsewhere")
    settings = LocalSettings(dir=Path("/here"))
    assert (settings.speed, settings.dir) == ("10", Path("/here"))


def test_instruments_are_a_json_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRADE_LOCAL_INSTRUMENTS", '["A.X", "B.X"]')
    assert LocalSettings().instruments == ("A.X", "B.X")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speed", "fast"),
        ("speed", "-1"),
        ("primary", "localhost"),
        ("primary", "a b:1"),
        ("decision_port", "65536"),
        ("replicas", "0"),
        ("replicas", "9"),
        ("start_timeout_seconds", "0"),
        ("data", "/no/such/directory"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PRETRADE_LOCAL_{name.upper()}", value)
    with pytest.raises(ValidationError, match=name) as refused:
        LocalSettings()
    (said,) = wrong_settings(refused.value)
    problem, purpose = said.split("\n")
    assert problem.startswith(f"PRETRADE_LOCAL_{name.upper()}: ")
    assert value not in problem or len(value) < 3, "it may be a password"
    assert "pydantic" not in said
    assert purpose.strip() == " ".join(descriptions(LocalSettings)[name].split())


def test_a_misspelt_variable_is_refused() -> None:
    refuse_unknown_variables({"PRETRADE_LOCAL_REDIS_URL": "redis://elsewhere", "PRETRADE_WORKER_X": "", "HOME": "/"})
    with pytest.raises(ValueError, match="PRETRADE_LOCAL_REDISURL"):
        refuse_unknown_variables({"PRETRADE_LOCAL_REDISURL": "redis://elsewhere"})


def test_every_setting_is_described() -> None:
    assert all(descriptions(LocalSettings)[name] for name in LocalSettings.model_fields)


def test_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no such part: redis"):
        Stack(LocalSettings(), parts={"redis"})


@pytest.mark.parametrize(("parts", "missing"), [({"worker", "valkey"}, "worker needs broker"), ({"server"}, "server")])
def test_a_part_without_what_it_needs_is_refused(parts: set[str], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        Stack(LocalSettings(), parts=parts)


def test_an_external_part_satisfies_the_need() -> None:
    Stack(LocalSettings(redis_url=secret("redis://elsewhere")), parts={"server"})


def test_a_directory_without_a_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="no recording"):
        Stack(LocalSettings(data=tmp_path))
