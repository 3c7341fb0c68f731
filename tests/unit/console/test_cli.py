"""What `pretrade console` refuses before it listens."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pretrade.client.file_lock import take_lock
from pretrade.client.stack_file import LOCK_FILE, Endpoints, StackFile
from pretrade.console.cli import app
from pretrade.console.tickets import Tickets


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


def test_where_the_stack_serves_a_console_there_is_a_link_to_that_one(tmp_path: Path) -> None:
    key = tmp_path / "link.key"
    key.write_text("of the stack")
    needed = (one.name for one in fields(Endpoints) if one.default is one.default_factory is MISSING)
    none: dict[str, Any] = dict.fromkeys(needed) | {"instruments": ()}
    served = {"console_url": "http://127.0.0.1:7020", "console_key_file": str(key), "admin": "127.0.0.1:1"}
    lock = take_lock(tmp_path / LOCK_FILE)
    assert lock is not None
    try:
        StackFile(pid=os.getpid(), endpoints=Endpoints(**none | served), processes={}).write(tmp_path)
        code, said = run("--dir", str(tmp_path))
        assert code == 0
        found = re.match(r"console: http://127\.0\.0\.1:7020/login\?ticket=(\S+)\n", said)
        assert found is not None
        assert Tickets(b"of the stack", time.time).fits(found[1])
        with socket.create_server(("127.0.0.1", 0)) as taken:
            code, said = run("--dir", str(tmp_path), "--port", str(taken.getsockname()[1]))
        assert "cannot listen" in said, "a port that is named is for a console of one's own"
    finally:
        os.close(lock)
