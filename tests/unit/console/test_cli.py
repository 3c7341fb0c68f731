"""What `pretrade console` refuses before it listens."""

from __future__ import annotations

import socket
from pathlib import Path

from typer.testing import CliRunner

from pretrade.console.cli import app


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_beyond_loopback_it_wants_tls() -> None:
    code, said = run("--target", "127.0.0.1:1", "--host", "0.0.0.0")
    assert code == 2
    assert "--certificate and --private-key" in said
    assert "--open-to-network" in said


def test_a_public_url_has_no_path() -> None:
    code, said = run("--target", "127.0.0.1:1", "--public-url", "https://example.com/console")
    assert code == 2
    assert "without a path" in said


def test_a_certificate_is_nothing_without_its_key(tmp_path: Path) -> None:
    code, said = run("--target", "127.0.0.1:1", "--certificate", str(tmp_path / "a.pem"))
    assert code == 2
    assert "go together" in said


def test_tokens_are_not_sent_to_another_machine_in_the_open() -> None:
    code, said = run("--target", "10.0.0.1:7002")
    assert code == 2
    assert "without TLS" in said


def test_without_a_server_it_says_how_to_name_one(tmp_path: Path) -> None:
    code, said = run("--dir", str(tmp_path))
    assert code == 3
    assert "--target HOST:PORT" in said


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = run("--target", "127.0.0.1:1", "--port", str(port))
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "--port" in said
