"""The generated pages are current, and every declared metric follows the rules for its name and labels."""

from __future__ import annotations

import re
from collections import Counter as Tally
from collections.abc import Callable

import pytest
from prometheus_client.core import HistogramMetricFamily

from feature_cache.bars import metrics as bars_metrics
from feature_cache.metrics import Counter, Declaration
from feature_cache.sources import metrics as ingest_metrics
from feature_cache.worker import metrics as worker_metrics
from server.composition import metrics_port
from server.reference import LABELS, PAGES, metrics_page, reasons_page, settings, settings_page
from server.timing.histogram import LATENCY_EDGES_SECONDS, Histogram

ALL = (*metrics_port.METRICS, *worker_metrics.METRICS, *ingest_metrics.METRICS, *bars_metrics.METRICS)


@pytest.mark.parametrize(("page", "made"), [("metrics.md", metrics_page), ("reason-codes.md", reasons_page)])
def test_the_page_is_current(page: str, made: Callable[[], str]) -> None:
    assert (PAGES / page).read_text() == made(), "run `make pages`"


def test_the_page_of_settings_is_current() -> None:
    page = (PAGES / "settings.md").read_text()
    assert page == settings_page(), "run `make pages`"
    for name, _, text in settings():
        assert page.count(f"| `{name}` |") == 1, name
        assert text.endswith("."), name


def test_no_name_is_declared_twice() -> None:
    assert [name for name, times in Tally(each.name for each in ALL).items() if times > 1] == []


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_a_metric_is_named_in_base_units_and_labelled_by_what_is_bounded(metric: Declaration) -> None:
    assert re.fullmatch(r"pretrade(_[a-z0-9]+)+", metric.name)
    assert not metric.name.endswith(("_total", "_ms", "_us", "_milliseconds", "_kilobytes"))
    assert isinstance(metric, Counter) == metric.scraped_name.endswith("_total")
    assert set(metric.labels) <= set(LABELS)
    assert metric.meaning.endswith(".")


def test_every_label_that_is_explained_is_used() -> None:
    assert {label for metric in ALL for label in metric.labels} == set(LABELS)


def test_the_budgets_are_edges_of_the_histograms() -> None:
    assert {0.0005, 0.001, 0.002, 0.005, 0.010, 0.025} <= set(LATENCY_EDGES_SECONDS)


@pytest.mark.parametrize("budget", ["0.0005", "0.001", "0.002", "0.005", "0.01", "0.025"])
def test_an_answer_that_takes_its_budget_exactly_is_within_it(budget: str) -> None:
    histogram = Histogram()
    histogram.observe(float(budget))
    histogram.observe(float(budget) * 1.0001)
    family = HistogramMetricFamily("h", "h")
    family.add_metric((), *histogram.buckets())
    within = {sample.labels.get("le"): sample.value for sample in family.samples}
    assert within[budget] == 1


def test_a_reason_has_its_whole_comment_also_where_that_has_several_lines() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", reasons_page(), re.MULTILINE))
    assert rows["OUT_OF_DOMAIN"].startswith("Guard, while the flag")
    assert rows["OUT_OF_DOMAIN"].endswith("its sign turned (FEATURE_IMPLAUSIBLE).")
    assert all(text[0].isupper() or text[0] == "`" for text in rows.values())
