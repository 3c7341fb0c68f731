"""What docs/http.md has a reader type, as it stands there, against the HTTP port."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.harness import INSTRUMENTS
from support.pages import Terminal, commands_of
from support.server_group import server_group

from local.stack.ports import free_ports

pytestmark = pytest.mark.stack


@pytest.mark.long
def test_every_command_of_the_page_prints_what_the_page_shows(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    settings = {"PRETRADE_GRPC__EDGE": "grpcio", "PRETRADE_HTTP__PORT": str(port)}
    terminal = Terminal(tmp_path, dict(os.environ))
    try:
        with server_group(tmp_path, 1, **settings):
            typed = commands_of("http.md")
            assert len(typed) == 10
            for command in typed:
                text = command.text.replace("127.0.0.1:7004", f"127.0.0.1:{port}")
                printed, code = terminal.run(text.replace("BTCUSDT.BINANCE", INSTRUMENTS[0]) + " && echo")
                assert code == 0, printed
                (shown,) = command.shown
                assert shown in printed, (command.text, printed)
    finally:
        terminal.close()
