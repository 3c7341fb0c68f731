"""Replays many decisions: do they come out as recorded, and what would callers have heard with another model?

What became of a reply is a fact that no replay changes. A caller that heard ABSTAIN because the packet was late, or
nothing because it had gone, would have heard the same with any other model. A what-if therefore counts what callers
heard, and what they would have heard.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Group, RenderableType
from rich.table import Table

from pretrade.audit.v1 import audit_pb2
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.heard import NO_ACTION, cause_of
from server.audit.replay.replay import AS_RECORDED, Replay, Replayer, WhatIf
from server.errors import NotReplayableError
from server.journal.reply_status import REPLIED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACTIONS: Final = (
    audit_pb2.HEARD_ACTION_TRADE,
    audit_pb2.HEARD_ACTION_NO_TRADE,
    audit_pb2.HEARD_ACTION_ABSTAIN,
)
_SHOWN_DIFFERENCES: Final = 10


@dataclass(slots=True)
class Comparison:
    """What came of replaying many decisions."""

    what_if: WhatIf
    decisions: int = 0
    equal: int = 0
    """Decisions that came out as recorded: bit-equal, or in a what-if with the same action heard."""
    by_source: Counter[str] = field(default_factory=Counter)
    actions: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(what the caller heard, what it would have heard) → decisions."""
    unlike: Counter[str] = field(default_factory=Counter)
    """Why the decision is not what its caller heard, or may not be → decisions."""
    different: list[Replay] = field(default_factory=list)
    """Decisions that did not come out as recorded, the first `_SHOWN_DIFFERENCES`."""
    not_replayable: Counter[str] = field(default_factory=Counter)
    """Why → decisions."""
    scores: list[tuple[float, float]] = field(default_factory=list)
    """(recorded, replayed) score of every decision that has both."""
    thresholds: set[tuple[float, float]] = field(default_factory=set)
    """(recorded, replayed) thresholds."""

    @property
    def replayed(self) -> int:
        """Decisions that could be replayed."""
        return self.decisions - self.not_replayable.total()

    def add(self, decision: audit_pb2.AuditedDecision, replay: Replay) -> None:
        """Counts a replay."""
        recorded = replay.packet.decision
        self.by_source[enum_name(pb.Source, recorded.source)] += 1
        would_hear = int(decision.heard_action)
        if decision.reply_status == REPLIED:
            would_hear = replay.action
        else:
            self.unlike[cause_of(decision)] += 1
        self.actions[decision.heard_action, would_hear] += 1
        is_what_if = self.what_if != AS_RECORDED
        if would_hear == decision.heard_action if is_what_if else replay.first_difference is None:
            self.equal += 1
        elif len(self.different) < _SHOWN_DIFFERENCES:
            self.different.append(replay)
        if recorded.HasField("score") and not math.isnan(replay.score):
            self.scores.append((recorded.score, replay.score))
            self.thresholds.add((recorded.threshold, replay.threshold))


async def compare(decisions: Iterable[audit_pb2.AuditedDecision], replayer: Replayer, what_if: WhatIf) -> Comparison:
    """Replays decisions as the replayer is configured."""
    comparison = Comparison(what_if)
    for decision in decisions:
        comparison.decisions += 1
        try:
            comparison.add(decision, await replayer.replay(decision.packet))
        except NotReplayableError as error:
            comparison.not_replayable[str(error)] += 1
    return comparison


def tables(comparison: Comparison) -> RenderableType:
    """A comparison as readable tables."""
    parts: list[RenderableType] = []
    is_what_if = comparison.what_if != AS_RECORDED
    sources = ", ".join(f"{name} {count:,}" for name, count in comparison.by_source.most_common())
    kind = "with the same action" if is_what_if else "bit-equal"
    parts.append(
        f"{comparison.decisions:,} decisions, {comparison.replayed:,} replayed ({sources or 'none'}): "
        f"{comparison.equal:,} {kind}, {comparison.replayed - comparison.equal:,} different"
    )
    parts.append(_heard(comparison))
    if is_what_if:
        parts.append(_confusion(comparison))
    if comparison.different:
        first = Table(title="the first that differ", title_justify="left")
        for column in ("decision", "field", "recorded", "replayed"):
            first.add_column(column, overflow="fold")
        for replay in comparison.different:
            decision = replay.packet.decision
            if is_what_if or replay.first_difference is None:
                first.add_row(
                    decision.decision_id,
                    "action",
                    enum_name(pb.Action, decision.action),
                    enum_name(pb.Action, replay.action),
                )
            else:
                difference = replay.first_difference
                first.add_row(decision.decision_id, difference.field, difference.recorded, difference.replayed)
        parts.append(first)
    parts += [f"{count:,} not replayable: {why}" for why, count in comparison.not_replayable.most_common(5)]
    return Group(*parts)


def _heard(comparison: Comparison) -> str:
    """What callers heard, in a line."""
    counts: Counter[int] = Counter()
    for (action, _), count in comparison.actions.items():
        counts[action] += count
    heard = ", ".join(f"{_name(action)} {counts[action]:,}" for action in (*_ACTIONS, *NO_ACTION) if counts[action])
    line = f"callers heard: {heard or 'nothing that was replayed'}"
    if comparison.unlike:
        causes = ", ".join(f"{cause} {count:,}" for cause, count in comparison.unlike.most_common())
        line += f"; {comparison.unlike.total():,} not, or perhaps not, what was decided: {causes}"
    return line


def _confusion(comparison: Comparison) -> Table:
    shown = [*_ACTIONS, *(action for action in NO_ACTION if comparison.actions[action, action])]
    table = Table(title="callers heard (rows) and would have heard (columns)", title_justify="left")
    table.add_column("")
    for action in shown:
        table.add_column(_name(action), justify="right")
    for action in shown:
        counts = (f"{comparison.actions[action, would_hear]:,}" for would_hear in shown)
        table.add_row(_name(action), *counts)
    return table


def _name(heard: int) -> str:
    name = enum_name(audit_pb2.HeardAction, heard)
    return name.lower() if heard in NO_ACTION else name


def plot(comparison: Comparison, path: Path) -> None:
    """Draws recorded against replayed scores, with the thresholds; the file's ending says in which format.

    Raises:
        ModuleNotFoundError: Without the extra `plots`.
        ValueError: The format is unknown, or there is no score to draw.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import

    if not comparison.scores:
        raise ValueError("no decision has a score to draw")
    figure = Figure(figsize=(10, 5), layout="constrained")
    pairs, distribution = figure.subplots(1, 2)
    recorded, replayed = zip(*comparison.scores, strict=True)
    pairs.scatter(recorded, replayed, s=4, alpha=0.4)
    pairs.set(xlabel="recorded score", ylabel="replayed score", title="score by score")
    distribution.hist([recorded, replayed], bins=40, label=["recorded", "replayed"])
    distribution.set(xlabel="score", ylabel="decisions", title="distribution and thresholds")
    for before, after in sorted(comparison.thresholds):
        _line(pairs, before, after)
        distribution.axvline(before, color="tab:blue", linestyle="--")
        distribution.axvline(after, color="tab:orange", linestyle="--")
    figure.legend(loc="outside lower center", ncols=2)  # within the axes it would cover bars
    figure.savefig(path)


def _line(axes: Axes, before: float, after: float) -> None:
    axes.axvline(before, color="tab:blue", linestyle="--")
    axes.axhline(after, color="tab:orange", linestyle="--")
