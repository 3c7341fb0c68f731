"""A TorchServe process is configured by us alone, on loopback, in its own directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from torchserve.config import TorchServeSettings, prepare


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    archive = tmp_path / "champion.mar"
    archive.write_bytes(b"")
    return archive


def properties_of(directory: Path) -> dict[str, str]:
    lines = (directory / "config.properties").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_one_model_one_worker_and_nothing_but_loopback(archive: Path, tmp_path: Path) -> None:
    prepare(TorchServeSettings(archive=archive, directory=tmp_path / "primary", grpc_port=7070))
    properties = properties_of(tmp_path / "primary")
    assert properties["load_models"] == "champion=champion.mar"
    assert properties["default_workers_per_model"] == "1"
    assert properties["grpc_inference_port"] == "7070"
    assert {properties["grpc_inference_address"], properties["grpc_management_address"]} == {"127.0.0.1"}
    assert properties["inference_address"].startswith("unix:")
    assert properties["management_address"].startswith("unix:")
    assert properties["enable_metrics_api"] == "false"
    assert "metrics_address" not in properties


def test_metrics_are_served_on_loopback_when_asked_for(archive: Path, tmp_path: Path) -> None:
    prepare(TorchServeSettings(archive=archive, directory=tmp_path / "d", grpc_port=7070, metrics_port=8082))
    properties = properties_of(tmp_path / "d")
    assert properties["metrics_address"] == "http://127.0.0.1:8082"
    assert properties["metrics_mode"] == "prometheus"


def test_the_users_environment_does_not_reach_torchserves_configuration(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TS_CONFIG_FILE", "/somewhere/else")
    monkeypatch.setenv("LOG_LOCATION", "/somewhere/else")
    monkeypatch.setenv("JAVA_HOME", "/somewhere/else")
    monkeypatch.setenv("KEPT", "yes")
    monkeypatch.setenv("PRETRADE_REDIS_URL", "redis://:word@redis:6379/0")
    launch = prepare(TorchServeSettings(archive=archive, directory=tmp_path / "d", grpc_port=7070))
    assert "TS_CONFIG_FILE" not in launch.env
    assert "LOG_LOCATION" not in launch.env
    assert launch.argv[0] == str(Path(launch.env["JAVA_HOME"]) / "bin" / "java")
    assert launch.env["KEPT"] == "yes"
    assert not [name for name in launch.env if name.startswith("PRETRADE_")], "an archive's code would see passwords"
    assert launch.env["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("length", [10, 200])
def test_sockets_have_a_path_that_fits_however_deep_the_directory(length: int, archive: Path, tmp_path: Path) -> None:
    directory = tmp_path / ("x" * length)
    launch = prepare(TorchServeSettings(archive=archive, directory=directory, grpc_port=7070))
    temporary = Path(launch.env["TMPDIR"])
    try:
        assert len(os.fsencode(temporary / "management.sock")) <= 103
        assert temporary.is_dir()
        assert f"-Djava.io.tmpdir={temporary}" in launch.argv
        assert properties_of(directory)["inference_address"] == f"unix:{temporary / 'inference.sock'}"
    finally:
        temporary.rmdir()


def test_what_a_killed_process_left_is_removed(archive: Path, tmp_path: Path) -> None:
    settings = TorchServeSettings(archive=archive, directory=tmp_path / "d", grpc_port=7070)
    left = Path(prepare(settings).env["TMPDIR"]) / "models"
    left.mkdir()
    prepare(settings)
    assert not left.exists()


def test_a_missing_archive_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        prepare(TorchServeSettings(archive=tmp_path / "no.mar", directory=tmp_path / "d", grpc_port=7070))


@pytest.mark.parametrize("wrong", [{"grpc_port": 0}, {"heap_mebibytes": 1}, {"typo": 1}])
def test_wrong_settings_are_refused(wrong: dict[str, int], archive: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        TorchServeSettings(**{"archive": archive, "directory": tmp_path, "grpc_port": 7070, **wrong})  # type: ignore[arg-type]


def test_gpus_are_dealt_out_where_they_are_asked_for(archive: Path, tmp_path: Path) -> None:
    for gpus in (0, 2):
        prepare(TorchServeSettings(archive=archive, directory=tmp_path / "d", grpc_port=7070, gpus=gpus))
        assert properties_of(tmp_path / "d")["number_of_gpu"] == str(gpus)
