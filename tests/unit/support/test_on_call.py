"""The picture of what on-call sees names every row."""

from __future__ import annotations

from support.dashboards import Query, queries
from support.on_call import burning, picture

from pretrade.admin.v1 import admin_pb2


def test_every_row_has_the_name_that_grafana_gives_it() -> None:
    asked = [query for query in queries() if query.dashboard == "on-call"]
    labels = {"slo": "fresh-features", "state": "ACTIVE", "source": "PRIMARY", "severity": "page", "alertname": "A"}
    samples = [(query, {"metric": labels, "value": [0, "0.0123"]}) for query in asked]
    status = admin_pb2.GetStatusResponse(instance_id="a-name-of-the-machine-that-drew-it")
    text = picture(status, samples).export_text()
    for query in asked:
        assert query.panel in text
    rows = [line for line in text.splitlines() if "12.3 ms" in line]
    assert [name for name, row in zip(("p50", "p99", "p99.9"), rows, strict=True) if name not in row.split()] == []
    assert "{{" not in text
    assert "a-name-of-the-machine" not in text


def test_a_budget_that_burns_is_noticed() -> None:
    query = Query("on-call", "burn", "x", "{{slo}}", "short")
    assert burning([(query, {"metric": {"slo": "answered-in-10-ms"}, "value": [0, "48.7"]})]) == ["answered-in-10-ms"]
    assert burning([(query, {"metric": {"slo": "answered-in-10-ms"}, "value": [0, "0.9"]})]) == []
