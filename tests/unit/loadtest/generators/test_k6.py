"""Latencies that k6's samples tell: from when a call was due."""

from __future__ import annotations

import pytest

from loadtest.generators.k6 import NOT_SENT, measurement
from loadtest.generators.measurement import NO_REPLY

HEADER = "metric_name,timestamp,metric_value,proto,extra_tags,metadata"
AT = 1_795_293_002.0


def sample(name: str, at: float, n: int, value: int = 1, status: int | None = None) -> str:
    tags = f"n={n}" + (f"&status={status}" if status is not None else "")
    return f"{name},{round((AT + at) * 1e6)},{value:f},,{tags},"


def call(n: int, *, begun: float, ended: float, decisions: int = 1, status: int = 0) -> list[str]:
    later = ended + 0.004  # k6 turns the answer into objects
    return [
        sample("bench_begun", begun, n),
        sample("grpc_req_duration", ended, n),
        f"data_sent,{round((AT + ended) * 1e6)},268.0,,,",
        sample("bench_answered", later, n, decisions, status),
    ]


def test_latency_counts_from_when_a_call_was_due_and_ends_with_the_call() -> None:
    lines = [HEADER]
    for n in range(20):
        due = n / 10
        late = 0.25 if n == 15 else 0.0
        lines += call(n, begun=due + late, ended=due + late + 0.01)
    measured = measurement(lines, calls_per_second=10.0, orders_per_call=1, seconds=1.0)
    assert measured.decisions == 10  # the first second is the warm-up
    assert sorted(measured.latencies) == pytest.approx([0.01] * 9 + [0.26], abs=1e-5)
    assert not measured.errors


def test_calls_that_were_not_sent_not_answered_or_refused_are_errors() -> None:
    lines = [HEADER, *call(0, begun=0.0, ended=0.01)]
    lines += call(11, begun=1.1, ended=1.11, decisions=0, status=8)
    lines += call(12, begun=1.2, ended=1.21, decisions=0, status=4)
    lines += call(13, begun=1.3, ended=1.31, decisions=60)  # of a batch of 64
    lines.append(sample("bench_begun", 1.4, 14))
    measured = measurement(lines, calls_per_second=10.0, orders_per_call=64, seconds=0.5)
    assert measured.errors == {
        NOT_SENT: 64,
        "RESOURCE_EXHAUSTED": 64,
        "DEADLINE_EXCEEDED": 64,
        "NO_DECISION": 4,
        NO_REPLY: 64,
    }
    assert measured.decisions == 60
    assert measured.latencies == pytest.approx([0.01], abs=1e-5)


def test_a_run_without_a_call_is_none() -> None:
    with pytest.raises(RuntimeError, match="sent nothing"):
        measurement([HEADER], calls_per_second=10.0, orders_per_call=1, seconds=1.0)
