"""No setting tells a secret: every setting of every program is looked at, those that are added tomorrow as well."""

from __future__ import annotations

import asyncio
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from openfeature.exception import GeneralError
from openfeature.provider.in_memory_provider import InMemoryProvider
from pydantic import BaseModel, Secret, SecretBytes, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from structlog.testing import capture_logs

from feature_cache.kafka import KafkaSecurity
from feature_cache.worker.settings import WorkerSettings
from local.stack.settings import LocalSettings
from server import reference
from server.configuration import differences
from server.control.flags import FlagProviderError, Flags, provider_from
from server.settings import Settings

ROOTS: Final[tuple[type[BaseModel], ...]] = (Settings, WorkerSettings, KafkaSecurity, LocalSettings)
"""What the programs read from their environment."""
MARK: Final = "hunter2"
_SMELLS: Final = re.compile(
    r"(pass(word|wd|phrase)?|secret|token|key|credential|url|uri|dsn|options|auth|private|cookie|headers)(s|_|$)"
)
NO_SECRETS: Final = {
    "tokens": "a section",
    "tokens.jwks": "public keys; a URL with a password in it is refused",
    "replicas.token_files": "paths",
    "models.token_files": "paths",
    "control.shared.key": "a name in Redis",
    "canary.archive_url": "one with a password in it is refused",
}
"""Settings that smell of a secret and are none, with the reason."""


class Setting(NamedTuple):
    root: type[BaseModel]
    path: tuple[str, ...]
    field: FieldInfo

    @property
    def name(self) -> str:
        return ".".join(self.path)


def walk(root: type[BaseModel], model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every setting, sections and what is inside of them."""
    for name, field in model.model_fields.items():
        yield Setting(root, (*path, name), field)
        for inner in models_in(field.annotation):
            yield from walk(root, inner, (*path, name))


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


def is_secret(annotation: Any) -> bool:
    if annotation in (SecretStr, SecretBytes) or typing.get_origin(annotation) is Secret:
        return True
    if isinstance(annotation, type) and issubclass(annotation, SecretStr | SecretBytes | Secret):
        return True
    return typing.get_origin(annotation) in (types.UnionType, typing.Union, typing.Annotated) and any(
        is_secret(argument) for argument in typing.get_args(annotation) if argument is not type(None)
    )


SETTINGS: Final = [setting for root in ROOTS for setting in walk(root, root)]
SECRETS: Final = [setting for setting in SETTINGS if is_secret(setting.field.annotation)]


def label(setting: Setting) -> str:
    return f"{setting.root.__name__}.{setting.name}"


def test_the_walk_reaches_everything() -> None:
    names = {label(setting) for setting in SETTINGS}
    assert len(names) > 150
    assert {"Settings.control.shared.key", "Settings.replicas.other_challengers.endpoint"} <= names
    assert {label(setting) for setting in SECRETS} == {
        "Settings.redis_url",
        "Settings.database_url",
        "Settings.market.bars_database_url",
        "Settings.control.flag_provider_options",
        "WorkerSettings.redis_url",
        "KafkaSecurity.password",
        "LocalSettings.redis_url",
        "LocalSettings.database_url",
    }


@pytest.mark.parametrize("setting", SETTINGS, ids=label)
def test_what_smells_of_a_secret_has_the_type_of_one(setting: Setting) -> None:
    annotation = setting.field.annotation
    kinds = set(typing.get_args(annotation) or (annotation,))
    can_hold_one = not kinds <= {int, float, bool, Path, type(None)}
    if not _SMELLS.search(setting.path[-1]) or is_secret(annotation) or not can_hold_one:
        return
    assert setting.name in NO_SECRETS, f"{setting.name}: SecretStr, or a reason why not"


def test_the_reasons_are_of_settings_that_exist() -> None:
    assert set(NO_SECRETS) <= {setting.name for setting in SETTINGS}


def with_a_secret(setting: Setting) -> BaseModel:
    """Settings of which this one holds a secret."""
    urls: dict[str, object] = {"redis_url": f"redis://:{MARK}@127.0.0.1/0"}
    urls["database_url"] = urls["bars_database_url"] = f"postgresql+psycopg://u:{MARK}@127.0.0.1/audit"
    value: Any = urls.get(setting.path[-1], {"sdk_key": MARK} if setting.path[-1].endswith("options") else MARK)
    others: dict[str, Any] = {}
    if setting.root is KafkaSecurity:
        others = {"tls": True, "sasl_mechanism": "PLAIN", "username": "u"}
    for name in reversed(setting.path):
        value = {name: value}
    return setting.root.model_validate(others | value)


@pytest.mark.parametrize("setting", SECRETS, ids=label)
def test_nothing_that_is_made_of_settings_holds_a_secret(setting: Setting) -> None:
    made = with_a_secret(setting)
    without = setting.root()
    told = {
        "what the journal, the database and a replay get": made.model_dump_json(),
        "the same as an object": str(made.model_dump(mode="json")) + str(made.model_dump()),
        "repr": repr(made),
        "str": str(made),
        "format": f"{made}",
        "the schema": json.dumps(setting.root.model_json_schema(), default=str),
    }
    if isinstance(made, Settings) and isinstance(without, Settings):
        told["what a reload changes"] = "\n".join([*differences(without, made), *differences(made, without)])
        told["the hash"] = made.config_hash()
    for what, text in told.items():
        assert MARK not in text, what
    # It is there all the same, for whoever needs it.
    value: Any = made
    for name in setting.path:
        value = getattr(value, name)
    assert MARK in str(value.get_secret_value())


@pytest.mark.parametrize("setting", SECRETS, ids=label)
@pytest.mark.parametrize("fault", ["wrong type", "another setting", "a misspelt neighbour", "a list"])
def test_an_error_quotes_no_secret(setting: Setting, fault: str) -> None:
    def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
        for name in reversed(path):
            value = {name: value}
        assert isinstance(value, dict)
        return value

    *section, name = setting.path
    values = {
        "wrong type": nested(setting.path, {"no": {MARK}}),
        "another setting": nested(setting.path, MARK) | {"no_such_setting": MARK},
        "a misspelt neighbour": nested((*section, f"{name}x"), MARK),
        "a list": nested(setting.path, [MARK]),
    }[fault]
    if fault == "wrong type" and name.endswith("options"):
        values = nested(setting.path, f"{{{MARK}")  # no JSON
    with pytest.raises(ValidationError) as error:
        setting.root.model_validate(values)
    assert MARK not in f"{error.value} {error.value!r}"


def test_the_reference_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRADE_REDIS_URL", f"redis://:{MARK}@127.0.0.1/0")
    assert MARK not in str(list(reference.settings()))


def test_options_of_a_flag_provider_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRADE_CONTROL__FLAG_PROVIDER_OPTIONS", json.dumps({"sdk_key": MARK, "port": 8_013}))
    assert Settings().control.flag_provider_options.get_secret_value() == {"sdk_key": MARK, "port": 8_013}


class Choosy:
    """A provider that says what it was given."""

    def __init__(self, *, error: type[Exception], **options: Any) -> None:
        raise error(f"cannot connect with {options}")


@pytest.mark.parametrize("error", [TypeError, RuntimeError, KeyError])
def test_a_provider_that_refuses_its_options_does_not_tell_them_through_us(error: type[Exception]) -> None:
    options: Mapping[str, Any] = {
        "error": error,
        "environment": "prod",
        "sdk_key": f"prod-{MARK}",
        "nested": {"also": [f"{MARK}-nested"]},
        "port": 8_013,
    }
    with pytest.raises(FlagProviderError) as refusal:
        provider_from(f"{__name__}:Choosy", options)
    error_text = str(refusal.value)
    assert MARK not in error_text
    assert "cannot connect" in error_text
    assert "8013" in error_text, "what is no text is no secret"


class Talkative(InMemoryProvider):
    """A provider that names its key when it fails."""

    def __init__(self, key: str, error: type[Exception], *, starts: bool) -> None:
        super().__init__({})
        self._error, self._starts = error(f"401 for https://flags.example/?sdkKey={key}"), starts

    def initialize(self, evaluation_context: object) -> None:
        if not self._starts:
            raise self._error

    def resolve_boolean_details(self, *arguments: Any, **keywords: Any) -> Any:
        raise self._error


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("error", [GeneralError, OSError])
async def test_a_provider_that_fails_later_does_not_tell_its_options_through_us(
    error: type[Exception], *, starts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"sdk_key": MARK}
    provider = Talkative(MARK, error, starts=starts)
    flags = Flags({"shadow": True}, provider, lambda values: None, options)
    with capture_logs() as lines:
        following = asyncio.create_task(flags.run())
        async with asyncio.timeout(20):
            while not flags.problem:  # noqa: ASYNC110 - a plain attribute
                await asyncio.sleep(0.005)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert "401 for https://flags.example/?sdkKey=…" in flags.problem
    assert [line["problem"] for line in lines] == [flags.problem]
    assert MARK not in caplog.text, "the SDK tells it"


@pytest.mark.parametrize(
    ("root", "values"),
    [
        (Settings, {"tokens": {"issuer": "us", "jwks": f"https://u:{MARK}@issuer.example/keys"}}),
        (Settings, {"tracing": {"otlp_endpoint": f"https://u:{MARK}@otel:4317"}}),
        (Settings, {"decisions_topic": {"bootstrap_servers": f"u:{MARK}@kafka:9092"}}),
        (Settings, {"canary": {"archive_url": f"https://u:{MARK}@store/{{version}}.mar"}}),
        (Settings, {"replicas": {"primary": f"u:{MARK}@a:7070"}}),
        (WorkerSettings, {"kafka_bootstrap_servers": f"u:{MARK}@kafka:9092"}),
        (LocalSettings, {"kafka_bootstrap_servers": f"u:{MARK}@kafka:9092"}),
    ],
)
def test_an_address_with_a_password_in_it_is_refused_where_it_would_be_shown(
    root: type[BaseModel], values: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as error:
        root.model_validate(values)
    assert MARK not in str(error.value)


def test_every_program_reads_its_settings_without_quoting_them() -> None:
    for root in ROOTS:
        assert root.model_config.get("hide_input_in_errors") is True, root.__name__


def test_a_path_is_no_secret() -> None:
    assert isinstance(Settings().journal.path, Path)
