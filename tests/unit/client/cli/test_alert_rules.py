"""`pretrade alerts rules` against a server that answers what a test gives it."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from support.admin_server import AdminServer, admin_server
from typer.testing import CliRunner, Result

from pretrade.admin.v1 import admin_pb2
from pretrade.client.cli.main import app

FILE = '{"groups": []}\n'


def run(server: AdminServer, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["alerts", "rules", *arguments, "--target", server.address])


def listed(_request: object) -> admin_pb2.ListAlertRulesResponse:
    share = admin_pb2.DecisionShare(action="TRADE", strategy="twap", window=Duration(seconds=300))
    spread = admin_pb2.FeatureValue(name="spread_bps")
    rules = [
        admin_pb2.AlertRule(
            name="twap",
            share=share,
            above=0.9,
            lasting=Duration(seconds=300),
            cooldown=Duration(seconds=60),
            severity="ticket",
        ),
        admin_pb2.AlertRule(name="wide", feature=spread, below=-2, severity="page"),
    ]
    return admin_pb2.ListAlertRulesResponse(rules=rules, rules_file=FILE, control_version=7)


def put(request: admin_pb2.SetAlertRuleRequest) -> admin_pb2.SetAlertRuleResponse:
    change = admin_pb2.Change(subject="alert_rules", version=8, diff=["+ something"], dry_run=request.dry_run)
    return admin_pb2.SetAlertRuleResponse(change=change)


def gone(request: admin_pb2.DeleteAlertRuleRequest) -> admin_pb2.DeleteAlertRuleResponse:
    return admin_pb2.DeleteAlertRuleResponse(change=admin_pb2.Change(version=8))


def test_rules_are_listed_in_words() -> None:
    with admin_server(ListAlertRules=listed) as server:
        assert run(server, "list").output.splitlines() == [
            "twap: ticket while TRADE share of strategy twap over 300 s is above 0.9 for 300 s, then for another 60 s",
            "wide: page while spread_bps of each instrument is below -2",
        ]


def test_a_rule_is_set_as_it_is_written_with_author_and_reason() -> None:
    words = "set twap --share trade --strategy twap --window 10m --above 0.9 --for 5m --cooldown 1h --severity page"
    with admin_server(SetAlertRule=put) as server:
        done = run(server, *words.split(), "--author", "ann", "--reason", "the desk asked")
        assert done.exit_code == 0, done.output
    ((_, request),) = server.asked
    assert request == admin_pb2.SetAlertRuleRequest(
        rule=admin_pb2.AlertRule(
            name="twap",
            share=admin_pb2.DecisionShare(action="TRADE", strategy="twap", window=Duration(seconds=600)),
            above=0.9,
            lasting=Duration(seconds=300),
            cooldown=Duration(seconds=3600),
            severity="page",
        ),
        author="ann",
        reason="the desk asked",
    )


def test_a_rule_on_a_feature_is_set_and_a_rule_is_deleted() -> None:
    with admin_server(SetAlertRule=put, DeleteAlertRule=gone) as server:
        assert run(server, "set", "wide", "--feature", "spread_bps", "--below", "-2", "--dry-run").exit_code == 0
        assert run(server, "delete", "wide").exit_code == 0
    (_, request), (_, deleted) = server.asked
    assert request.dry_run
    assert (request.rule.feature.name, request.rule.below, request.rule.severity) == ("spread_bps", -2, "ticket")
    assert deleted.name == "wide"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--above 1", "either --share or --feature"),
        ("--share trade --feature spread_bps --above 1", "either --share or --feature"),
        ("--share trade", "either --above or --below"),
        ("--share trade --instrument BTC --above 1", "--instrument belongs to --feature"),
        ("--feature spread_bps --strategy twap --above 1", "--strategy belongs to --share"),
    ],
)
def test_words_that_do_not_go_together_ask_no_server(words: str, said: str) -> None:
    with admin_server(SetAlertRule=put) as server:
        done = CliRunner().invoke(
            app, ["alerts", "rules", "set", "x", *words.split(), "--target", server.address], env={"COLUMNS": "200"}
        )
    assert (done.exit_code, server.asked) == (2, [])
    assert said in done.output


@contextmanager
def prometheus(status: int) -> Iterator[tuple[str, list[str]]]:
    """Answers every request with a status."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"a rule is wrong")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_rules_are_written_whole_and_prometheus_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "user.rules.yaml"
    with admin_server(ListAlertRules=listed) as server, prometheus(200) as (url, asked):
        assert run(server, "write", str(file), "--prometheus", url).exit_code == 0
    assert file.read_text() == FILE
    assert asked == ["/-/reload"]
    assert list(tmp_path.iterdir()) == [file]


def test_what_prometheus_does_not_take_is_said(tmp_path: Path) -> None:
    with admin_server(ListAlertRules=listed) as server, prometheus(500) as (url, _):
        done = run(server, "write", str(tmp_path / "rules"), "--prometheus", url)
    assert done.exit_code == 1
    assert "Prometheus does not take its files: a rule is wrong" in done.output


def test_a_server_that_cannot_be_reached_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "rules"
    file.write_text("before")
    with admin_server() as server:
        pass
    assert run(server, "write", str(file)).exit_code == 3
    assert file.read_text() == "before"


def test_rules_are_written_for_the_operator_of_prometheus(tmp_path: Path) -> None:
    file = tmp_path / "rules"
    with admin_server(ListAlertRules=listed) as server:
        assert run(server, "write", str(file), "--kubernetes").exit_code == 0
    assert json.loads(file.read_text()) == {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "pretrade-user"},
        "spec": {"groups": []},
    }
