"""Pages for people to read, made from the code that defines what they describe: reason codes, metrics, settings.

`python -m server.reference` writes `docs/reason-codes.md`, `docs/metrics.md` and `docs/settings.md` (`make pages` does,
too). Tests check that all are current.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from pydantic import BaseModel, Secret, SecretStr

from feature_cache.bars import metrics as bars_metrics
from feature_cache.constants import is_constant
from feature_cache.described import descriptions
from feature_cache.metrics import Declaration, Histogram
from feature_cache.sources import metrics as ingest_metrics
from feature_cache.worker import metrics as worker_metrics
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.composition import metrics_port
from server.settings import PREFIX, Settings
from server.timing.histogram import LATENCY_EDGES_SECONDS, ROW_EDGES

PAGES: Final = Path(__file__).parents[1] / "docs"
_PROTO: Final = Path(__file__).parents[1] / "proto/pretrade/decision/v1/decision.proto"

_REASONS_INTRODUCTION: Final = """\
# Reason codes

Read this when a decision is not what you expected: `Decision.reasons` says why it is what it is.

The first reason is that of the source that answered. Each further one is the objection of a *guard*:
a check that runs after every source and can only make a decision safer. A guard turns TRADE into
NO_TRADE or ABSTAIN, and never the other way round.
What happened on the way, such as a replica that was passed over, is in `Decision.degradations`; the
contract ([decision.proto](../proto/pretrade/decision/v1/decision.proto)) explains each of those.

<!-- Made by `make pages` from the contract's comments. -->
"""

LABELS: Final = {
    "answered_by": "`lane`, `application`",
    "action": "`TRADE`, `NO_TRADE`, `ABSTAIN`",
    "cause": "`failed`, `degraded`, `slow`, `caller` (it keeps the trace), `sample`",
    "check": "what a canary is compared by, from `errors` to `better`",
    "client": "`direct` or `grpc`",
    "degradation": "the contract's `Degradation`",
    "edge": "`envoy`, `grpcio`",
    "fate": "what became of it: a handful of words in the code",
    "feature": "the features of the feature set, and `score`",
    "file": "what may be replaced at any time: `certificates`, `token keys`, `revoked tokens`, `access policy`, "
    "`tls of …`",
    "flag": "the flags of `pretrade flag`",
    "instrument": "server: `PRETRADE_INSTRUMENTS`; worker: the instruments on its partitions; feed: `--instruments`",
    "kind": "`retry`, `hedge`",
    "set": "ids of the computed feature sets",
    "sink": "`log`, `traces`",
    "outcome": "outcomes of a batch, from `success` to `ignored`",
    "part": "`caller`, or the id of a feature set",
    "partition": "partitions of the topic `market.events`",
    "plane": "`decision`, `admin`",
    "question": "`lookups`, `watching`, `replays`, `explanations`, `drift`, `checks`",
    "reader": "`reads`, `models`",
    "reason": "the contract's `ReasonCode` or `Degradation`; for errors, poison records and suspensions, codes of ours",
    "model": "`default`, and the names in `PRETRADE_MODELS`",
    "replica": "`primary`, `secondary`, `challenger`; of several endpoints `primary-1`, `primary-2` …; of another "
    "model than the default one `NAME/primary`",
    "source": "the contract's `Source`",
    "stage": "the contract's `Stage`",
    "strategy": "the 50 strategies that came first, those that an alert rule of a user names, and `(others)`",
    "step": "`read`, `written`",
    "state": "of a breaker: `closed`, `half_open`, `open`; of trading: `ACTIVE`, `REDUCING`, `HALTED`",
    "status": "the contract's `ExplanationStatus`",
    "turn": "what can happen to a canary, from `started` to `aborted`",
    "verdict": "`no_evidence`, `better_or_equal`, `worse`",
    "why": "from `lone` to `bug`; [sizing](sizing.md#orders-that-are-decided-one-by-one) explains each",
    "window": "over which it was measured, like `300s`",
}
"""Every label there is, and what bounds its values: never an order or a caller."""


def metrics_page() -> str:
    """Every metric as Markdown tables, a section for each process that shows some."""
    edges = ", ".join(f"{edge * 1e3:g}" for edge in LATENCY_EDGES_SECONDS)
    rows = ", ".join(f"{edge:g}" for edge in ROW_EDGES)
    return "\n".join(
        (
            "# Metrics",
            "",
            "Read this when you build a dashboard or an alert, or want to know what a metric means.",
            "",
            "<!-- Made by `make pages` from the files `metrics.py` of server and feature_cache. -->",
            "",
            "Prometheus scrapes `/metrics`: of a decision server at its metrics port (7003; of process *i* of several"
            " at 7003 + *i*), of the worker at `PRETRADE_WORKER_METRICS_PORT`, of a live feed at `--metrics-port`,"
            " of the keeper of bars at `PRETRADE_BARS_METRICS_PORT`."
            " Counters begin at 0 with the process.",
            "",
            f"Histograms have buckets up to {edges} ms: a share of answers within one of these budgets is exact."
            f" Those that count rows have them up to {rows}, that of event delays at every millisecond up to 10 ms, and"
            " wider up to 10 s.",
            "",
            "## Decision server",
            "",
            *_metrics_table(metrics_port.METRICS),
            "",
            "The metrics of the topic are there where decisions are published to one, those of spans where a collector"
            " is named.",
            "",
            "## Feature worker",
            "",
            *_metrics_table(worker_metrics.METRICS),
            "",
            "## Live feed",
            "",
            *_metrics_table(ingest_metrics.METRICS),
            "",
            "## Keeper of bars",
            "",
            *_metrics_table(bars_metrics.METRICS),
            "",
            "## Labels",
            "",
            "| label | its values |",
            "|---|---|",
            *(f"| `{name}` | {values} |" for name, values in LABELS.items()),
            "",
        )
    )


def _metrics_table(metrics: Iterable[Declaration]) -> Iterator[str]:
    yield from ("| metric | type | labels | unit | meaning |", "|---|---|---|---|---|")
    for each in metrics:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        series = f"`{each.scraped_name}`" + (" (`_bucket`, `_sum`, `_count`)" if isinstance(each, Histogram) else "")
        yield f"| {series} | {each.kind} | {labels} | {each.unit} | {each.meaning} |"


def settings() -> Iterator[tuple[str, str, str]]:
    """(variable, default, description) of every setting."""
    yield from _fields(Settings, PREFIX)


_HEADINGS: Final = {
    "The ports and the processes": ("", "grpc", "admin", "http", "metrics"),
    "The models": ("replicas", "oip", "replica", "batcher", "breaker", "retry"),
    "The time of a decision": ("budget", "admission", "idempotency", "stream"),
    "Features": ("features", "feature_cache"),
    "What is answered without a model, and the guards": ("chain", "embedded", "cached_score", "rules", "guards"),
    "Steering and canaries": ("control", "shadow", "canary", "slo"),
    "The audit": ("journal", "shipping", "decisions_topic", "replay", "explain", "drift", "audit_watch", "market"),
    "Logs and traces": ("tracing", "decision_log"),
    "Credentials and access": ("tls", "tokens", "access"),
}
"""The groups of the settings page; the empty name stands for what is in no section."""
_UNITS: Final = {
    "_seconds": "s",
    "_days": "days",
    "_bps": "bp",
    "_bytes": "bytes",
    "_mebibytes": "MiB",
    "_rows": "rows",
    "_per_second": "1/s",
    "_share": "share, 0 to 1",
    "_rank_disagreement": "-1 to 1",
    "_imbalance": "0 to 1",
    "_ofi": "mean depths",
    "_notional": "quote currency",
    "_port": "port",
    "_processes": "processes",
    "_judges": "processes",
    "_partitions": "partitions",
    "_failures": "batches",
    "batcher__slots": "batches",
    "breaker__minimum_calls": "batches",
    "_pending_calls": "calls",
    "_events": "calls",
    "_in_flight": "decisions",
    "__one_in": "decisions",
    "_keys": "keys",
    "min_orders": "observations",
    "min_pairs": "observations",
    "min_outcomes": "observations",
    "_steps": "shares, 0 to 1",
    "_objective": "share, 0 to 1",
    "__failure_rate": "share, 0 to 1",
    "__canary_rate": "multiple",
    "_excess": "share, 0 to 1",
    "_disagreement": "share, 0 to 1",
    "_score_shift": "probability",
}


def settings_page() -> str:
    """Every setting as Markdown tables, a section for each part of the server."""
    lines = [
        "# Settings",
        "",
        "<!-- Made by `make pages` from the sections in server, fallback and feature_cache. -->",
        "",
        "Read this when you deploy a decision server, or when it does not do what you expect. All settings have"
        " defaults that fit one server on one machine. Begin with the addresses, and change another setting only when"
        " its row gives you a reason.",
        "",
        "The server reads a setting from the environment variable that is named here. A secret may also be in a file of"
        " that name in the directory `PRETRADE_SECRETS_DIR`. A setting that is in neither is read from the TOML file"
        " `PRETRADE_CONFIG_FILE`, where each section is a table. The server refuses to start with an unknown name or a"
        " wrong value. A setting without a unit is a name, an address, a file, a list or a switch.",
        "",
        "Numbers that no user needs to decide, such as pauses between retries, are constants in the code, each with its"
        " reason.",
        "",
    ]
    for heading, sections in _HEADINGS.items():
        lines += [f"## {heading}", ""]
        for section in sections:
            if section:
                model = type(Settings.model_fields[section].default)
                rows = list(_fields(model, f"{PREFIX}{section.upper()}__"))
                purpose = " ".join((model.__doc__ or "").split("\n\n")[0].split())
                lines += [f"**`[{section}]`** {purpose}", ""] if rows else []
            else:
                own = Settings.model_fields.items()
                names = {f"{PREFIX}{name.upper()}" for name, field in own if not isinstance(field.default, BaseModel)}
                rows = [row for row in settings() if row[0] in names]
            if rows:
                lines += ["| variable | default | unit | what it does, and when to change it |", "|---|---|---|---|"]
                lines += [f"| `{row[0]}` | {_cell(row[1])} | {_unit(row[0])} | {_escaped(row[2])} |" for row in rows]
                lines.append("")
    return "\n".join(lines)


def _cell(default: str) -> str:
    return default if default == "unset" else f"`{_escaped(default)}`" if default else "empty"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _unit(variable: str) -> str:
    return next((unit for suffix, unit in _UNITS.items() if variable.lower().endswith(suffix)), "")


def reasons_page() -> str:
    """Every reason code as a Markdown table, with the contract's own comment."""
    commented = re.findall(r"((?: *// .+\n)+)  (REASON_CODE_\w+) =", _PROTO.read_text())
    comments = {name: " ".join(text.replace("//", " ").split()) for text, name in commented}
    values = (value for value in pb.ReasonCode.values() if value)
    rows = (f"| `{enum_name(pb.ReasonCode, value)}` | {comments[pb.ReasonCode.Name(value)]} |" for value in values)
    return "\n".join((_REASONS_INTRODUCTION, "| reason | meaning |", "|---|---|", *rows, ""))


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        default = field.default
        if is_constant(field):
            continue
        if isinstance(default, BaseModel):
            yield from _fields(type(default), f"{variable}__")
        else:
            shown = default.get_secret_value() if isinstance(default, SecretStr | Secret) else default
            text = " ".join(descriptions(model)[name].split())
            yield variable, _shown(shown), text


def _shown(default: object) -> str:
    match default:
        case None:
            return "unset"
        case str():
            return default
        case tuple():
            return ", ".join(map(str, default))
        case _:
            return str(getattr(default, "value", default))


if __name__ == "__main__":
    (PAGES / "reason-codes.md").write_text(reasons_page())
    (PAGES / "metrics.md").write_text(metrics_page())
    (PAGES / "settings.md").write_text(settings_page())
