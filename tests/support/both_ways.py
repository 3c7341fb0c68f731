"""Any orders in any circumstances, decided twice: in columns where they can be, and each as a case of its own.

What both ways give has to be the same, wherever in the block an order stands and whatever the others meet. `orders` and
`circumstances` draw; `decided` decides, and says what callers, audit and metrics have of it.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from fallback.guards import GuardSettings, OrderLimit
from fallback.model_limits import NO_LIMITS, UNKNOWN, ModelLimits, limits_of
from fallback.order import CallContext, Order, Part
from feature_cache import features
from feature_cache.feature_set import ROW
from feature_cache.features import MF1
from feature_cache.store.codec import BookState, encode
from feature_cache.token_bucket import TokenBuckets
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.evidence import FirstAttempt
from server.canary.pairing import Side
from server.canary.plan import Canary
from server.decision import blocks
from server.errors import PretradeError
from server.inference.breaker import Mode
from server.inference.outcome import Outcome
from server.inference.retry_budget import RetryBudget, RetrySettings
from server.inference.wire import ModelIdentity, ScoreBatch
from support import planes
from support.plain_orders import meaning
from support.planes import INSTRUMENTS, Plane, market, packets_in
from support.scripted_replica import fails

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from server.decision.decided_block import OneDecided
    from server.decision.plane import Deciding
    from support.scripted_replica import Script

_GUARDS: Final = GuardSettings(price_collar_bps=50.0, max_notional=100_000.0)
Way: TypeAlias = Literal["columns", "alone"]
_IN_MEMORY: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Each example writes two journals, and how long a disk takes for that is not what is tested."""
_PATIENT: Final = planes.PATIENT.model_copy(update={"cap_seconds": 1_000.0})
"""Longer than any machine stands still: no order of these is late."""
VERSION: Final = "aa" * 8
CANARY: Final = "bb" * 8
DOMAIN: Final = {
    "features": ["imbalance_l1", "rv_5s_bps"],
    "patterns": [0],
    "low": [-1.0, 0.0],
    "high": [1.0, 40.0],
    "values": [[-1.0, 1.0], [0.0, 8.0]],
    "scores": [[-3.0, 3.0], [-3.0, 3.0]],
    "whitening": [[1.0, 0.0], [0.0, 1.0]],
    "distance": 30.0,
    "most_same": [2**60] * 2,
    "most_turned": [1e18] * 2,
}
"""What the model has seen; none of it is stuck or turned."""
_IMBALANCE, _VOLATILITY, _BOOK_AGE = (features.INDEX[name] for name in ("imbalance_l1", "rv_5s_bps", "book_age_ms"))
_STEP: Final = 0.05
"""The imbalance of an instrument says which one it is, and that of a sell has the other sign."""


@dataclass(frozen=True)
class Asked:
    """An order, how its caller sends it, and when the caller leaves."""

    instrument: int = 0
    side: pb.Side.ValueType = pb.SIDE_BUY
    quantity: float = 1.0
    limit_price: float = math.nan
    strategy: str = "twap"
    reduce_only: bool = False
    brings: Literal["", "correlation id", "trace", "key", "features"] = ""
    seconds: float = 900.0
    """That its caller waits; without any left it has come too late."""
    leaves: Literal["", "at once", "while the model is asked"] = ""

    def order(self, number: int) -> Order:
        """It, as the edge hands it on."""
        own = np.zeros(len(MF1), np.float32) if self.brings == "features" else None
        message = pb.Order(
            order_ref=f"o-{number:03}",
            instrument=INSTRUMENTS[self.instrument],
            side=self.side,
            quantity=self.quantity,
            strategy=self.strategy,
            reduce_only=self.reduce_only,
            idempotency_key=f"key-{number}" if self.brings == "key" else "",
        )
        if not math.isnan(self.limit_price):
            message.limit_price = self.limit_price
        made = Order(
            message.SerializeToString(),
            message.instrument,
            self.side,
            self.quantity,
            self.limit_price,
            self.strategy,
            self.reduce_only,
            own,
            message.order_ref,
            message.idempotency_key,
        )
        if self.brings == "correlation id":
            made.context = CallContext(correlation_id=f"work-{number}")
        elif self.brings == "trace":
            made.context = CallContext("ab" * 16, "cd" * 8)
        return made


@dataclass(frozen=True)
class Circumstances:
    """All that is not the orders' own."""

    markets: tuple[str, ...] = ("fresh",) * 3
    """Of each instrument: `fresh`, `stale`, `unknown` (its book), `missing`, `no mid`, or `odd` (to the model)."""
    scores: tuple[float, ...] = (0.9,) * 6
    """Of each instrument and side; some are none."""
    failure: Outcome | None = None
    """Of every call to the primary."""
    secondary_fails: bool = False
    out: tuple[str, ...] = ()
    """Replicas whose breakers are open."""
    state: admin_pb2.TradingState.ValueType = admin_pb2.TRADING_STATE_ACTIVE
    guards: GuardSettings = _GUARDS
    limits: Literal["none", "band", "domain", "unknown"] = "none"
    """Of the model."""
    expires: Literal["never", "later", "long ago"] = "never"
    """The model."""
    first: Literal["model", "embedded"] = "model"
    chain: tuple[str, ...] = ()
    """Stages that are asked instead of the default ones."""
    is_embedded: bool = True
    """Whether the model is in the server's own process, too."""
    control_is_stale: bool = False
    shadow: bool = False
    canary: Literal["", "sound", "fails", "other version", "odd"] = ""
    """What a model on trial is like, if there is one; `odd`: it scores otherwise, and not every row."""
    canary_weight: float = 0.5
    canary_of: Literal["", "twap"] = ""
    """The strategy that it is held to."""
    journal: Literal["sound", "full"] = "sound"


_FAR: Final = 1e-3
"""Seconds between deadlines that may share a block."""


def asked(plain: bool) -> st.SearchStrategy[Asked]:
    """An order; a plain one has neither a way nor a time of its own."""
    usual: dict[str, st.SearchStrategy[Any]] = {
        "instrument": st.integers(0, len(INSTRUMENTS) - 1),
        "side": st.sampled_from((pb.SIDE_BUY, pb.SIDE_SELL)),
        "strategy": st.sampled_from(("twap", "vwap")),
        "quantity": st.sampled_from((1.0, 0.5)),
        "limit_price": st.sampled_from((math.nan, 100.0, 99.6, 100.4)),
    }
    unusual: list[dict[str, st.SearchStrategy[Any]]] = [
        {"quantity": st.sampled_from((999.0, 1_000.0, 1_001.0, 1e-300, 1e300))},
        {"limit_price": st.sampled_from((100.5, 99.5, 101.0, 250.0, 1e-9))},
        {"reduce_only": st.just(True)},
    ]
    if not plain:
        unusual += [
            {"brings": st.sampled_from(("correlation id", "trace", "key", "features"))},
            {"seconds": st.sampled_from((900.0 + _FAR, 900.0 + 3 * _FAR, 500.0, -1.0))},
            {"leaves": st.sampled_from(("at once", "while the model is asked"))},
        ]
    plainly = st.builds(Asked, **usual)
    return st.one_of(plainly, plainly, plainly, *(st.builds(Asked, **(usual | one)) for one in unusual))


@st.composite
def circumstances(draw: st.DrawFn) -> Circumstances:
    """The usual ones, but for at most three things, and some scores."""
    scores = draw(st.tuples(*[st.sampled_from((0.9, 0.9, 0.1, 0.45))] * (2 * len(INSTRUMENTS))))
    changed = draw(st.sets(st.sampled_from(sorted(_UNUSUAL)), max_size=3))
    found = {name: draw(_UNUSUAL[name]) for name in sorted(changed)}
    if found.get("canary", "sound") != "sound":
        # An order that a canary and then the champion have failed has had its two attempts. Whether there is a cached
        # score for it goes by who of the others was decided first.
        for name in ("failure", "secondary_fails", "out"):
            found.pop(name, None)
    return Circumstances(**({"scores": scores} | found))


@contextmanager
def least_in_block(orders: int) -> Iterator[None]:
    """So many orders with callers of their own are enough for a block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "LEAST", orders)
        yield


@dataclass
class Found:
    """What came of some orders."""

    decisions: list[Any]
    """Of each what it means, or why there is none."""
    counted: dict[str, Any]
    packets: list[Any]
    allowed_us: list[int]
    """Of each decision: its caller's time, as the reply says it."""
    in_columns: int
    """Orders that were decided in columns."""
    alone: Mapping[str, int]
    """The others, by why they were not."""

    def comparable(self) -> tuple[list[Any], dict[str, Any], list[Any]]:
        """What has to be the same either way."""
        return self.decisions, self.counted, self.packets


def decided(way: Way, asked: Sequence[Asked], about: Circumstances, *, together: bool) -> Found:
    """Decides orders: `together` as one call, otherwise each with a caller of its own, all in one turn."""

    async def run(path: Path) -> Found:
        primary = _script(about, fails(about.failure) if about.failure else None)
        secondary = _script(about, fails(Outcome.TRANSPORT) if about.secondary_fails else None)
        size = 1 if about.journal == "full" else 100
        async with planes.plane(
            path,
            primary,
            secondary,
            first_stage=about.first,
            journal_mebibytes=size,
            budget=_PATIENT,
            max_in_flight=1_000,
            max_age_seconds=60.0,
            challenger=_challenger(about),
        ) as p:
            await _arrange(p, about)
            if way == "alone":
                p.chain._in_blocks = {}
            orders = [one.order(number) for number, one in enumerate(asked)]
            outcomes = await (_of_one_call(p, orders) if together else _of_callers(p, orders, asked))
            return await _found(p, outcomes, about)

    with tempfile.TemporaryDirectory(dir=_IN_MEMORY) as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder)
        if about.control_is_stale:
            patch.setattr("server.control.state.ControlState.stale", True)
        found = asyncio.run(run(path))
        found.packets = [_meaning(one, about) for one in packets_in(path)]
        found.packets.sort(key=lambda one: str(one["order"]["order_ref"]))
        return found


class _InProcess:
    """A model in the server's own process, which gives the same scores as the one on the replicas."""

    name, version, threshold, feature_set = "champion", VERSION, 0.5, MF1
    parts: tuple[Part, ...] = ()

    def __init__(self, about: Circumstances, expires_at: int) -> None:
        self._about = about
        self.expires_at = expires_at

    def scores_and_parts(self, rows: bytes) -> tuple[NDArray[np.float32], None]:
        """See `Scorer`."""
        size = self.feature_set.row_bytes
        return _scores(self._about, [rows[at : at + size] for at in range(0, len(rows), size)]), None


def _script(about: Circumstances, failing: Script | None) -> Script:
    async def script(rows: list[bytes]) -> ScoreBatch:
        await asyncio.sleep(0.001)
        model = ModelIdentity("champion", VERSION, 0.5, _expires_at(about), MF1)
        return ScoreBatch(model, _scores(about, rows))

    return failing or script


def _challenger(about: Circumstances) -> Script:
    async def script(rows: list[bytes]) -> ScoreBatch:
        await asyncio.sleep(0.001)
        version = VERSION if about.canary == "other version" else CANARY
        scores = _scores(about, rows)
        if about.canary == "odd":
            scores = np.where(scores == np.float32(0.45), np.nan, 1 - scores).astype(np.float32)
        return ScoreBatch(ModelIdentity("champion", version, 0.4, 0, MF1), scores)

    return fails(Outcome.MODEL_ERROR) if about.canary == "fails" else script


def _expires_at(about: Circumstances) -> int:
    return {"never": 0, "later": 2**62, "long ago": 1_000}[about.expires]


def _scores(about: Circumstances, rows: Sequence[bytes]) -> NDArray[np.float32]:
    return np.array([_score(about, row) for row in rows], dtype=np.float32)


def _score(about: Circumstances, row: bytes) -> float:
    """That of the instrument and the side that a row is of; 0.9 for a vector of the caller's own."""
    number = round(float(np.frombuffer(row, ROW)[_IMBALANCE]) / _STEP)
    return 0.9 if number == 0 else about.scores[2 * (abs(number) - 1) + (number < 0)]


async def _arrange(p: Plane, about: Circumstances) -> None:
    """Brings the circumstances about."""
    snapshot = market(0.1)
    for number, (name, kind) in enumerate(zip(INSTRUMENTS, about.markets, strict=True)):
        values = snapshot.values.copy()
        values[_IMBALANCE] = _STEP * (number + 1)
        values[_VOLATILITY] = 41.0 if kind == "odd" else 1.0
        if kind == "stale":
            values[_BOOK_AGE] = 1e9
        state = BookState.UNKNOWN if kind == "unknown" else BookState.VALID
        bid = math.nan if kind == "no mid" else snapshot.bid
        if kind != "missing":
            p.feature_cache.accept(encode(replace(snapshot, instrument=name, values=values, state=state, bid=bid)))
    for replica in p.replicas:  # after how many orders a breaker opens goes by with whom a row is scored
        replica.breaker.force(Mode.FORCED_OPEN if replica.name in about.out else Mode.FORCED_CLOSED)
    retries = RetryBudget(RetrySettings(share=1.0), p.clock)
    p.champion._retry_budget = retries
    p.embedded.scorer = _InProcess(about, _expires_at(about)) if about.is_embedded else None
    p.state = about.state
    p.guards.configure(about.guards)
    p.guards._rates = TokenBuckets(math.inf, 1.0, lambda: 0.0, most_names=None)  # nothing is refilled meanwhile
    p.limits = _limits(about)
    p.control.shadow = about.shadow
    p.routing.on_order(lambda side, attempt: _observe(p, side, attempt))
    if about.canary:
        canary = Canary.start("one", CANARY, VERSION, (1.0,), "ann", "better", 0.0, strategy=about.canary_of)
        p.routing.canary = canary.weighted(about.canary_weight, held=True, now=0.0)
    if about.chain:
        names: Any = about.chain
        p.chain.ask_in_order(names)
    if about.journal == "full":
        note = packet_pb2.ReplyUnconfirmed(decision_id="a" * 2**20)
        await p.journal.append(packet_pb2.JournalEntry(reply_unconfirmed=note).SerializeToString())


def _limits(about: Circumstances) -> ModelLimits:
    match about.limits:
        case "band":
            return ModelLimits(0.44, 0.46, has_band=True)
        case "domain":
            return limits_of({"domain": DOMAIN})
        case "unknown":
            return UNKNOWN
        case _:
            return NO_LIMITS


def _observe(p: Plane, side: Side, attempt: FirstAttempt) -> None:
    """An order speaks for or against a model."""
    p.observed[side.name, attempt.seconds <= attempt.allowed_seconds] += 1


Outcomes: TypeAlias = "list[OneDecided | bytes | str]"
"""Of each order its decision, or why there is none."""


async def _of_one_call(p: Plane, orders: Sequence[Order]) -> Outcomes:
    arrived = p.clock()
    begun = p.dataplane.begin_together(orders, arrived, arrived + 900.0)
    assert begun is not None
    await begun.ended()
    outcomes: Outcomes = [one if isinstance(one, bytes) else one.result() for one in begun.outcomes()]
    p.dataplane.heard([*begun.take_decided(), *(one for one in outcomes if not isinstance(one, (bytes, str)))])
    return outcomes


async def _of_callers(p: Plane, orders: Sequence[Order], asked: Sequence[Asked]) -> Outcomes:
    """Those that leave do so when all have come, or when the turn in which they came is over."""
    now = p.clock()
    outcomes: Outcomes = ["no decision"] * len(orders)
    begun: dict[int, Deciding] = {}
    for number, (order, one) in enumerate(zip(orders, asked, strict=True)):
        try:
            begun[number] = p.dataplane.begin(order, now, now + one.seconds, in_company=True)
        except PretradeError as error:
            outcomes[number] = type(error).__name__
    for moment in ("at once", "while the model is asked"):
        for number, deciding in begun.items():
            if asked[number].leaves == moment:
                p.dataplane.give_up(deciding)
        await asyncio.sleep(0)
    for number, deciding in begun.items():
        try:
            outcomes[number] = await deciding
        except (PretradeError, asyncio.CancelledError) as error:
            outcomes[number] = type(error).__name__
    p.dataplane.heard([one for one in outcomes if not isinstance(one, (bytes, str))])
    return outcomes


async def _found(p: Plane, outcomes: Outcomes, about: Circumstances) -> Found:
    """What came of the orders, when all of it is known."""
    embedded = sum(times for (source, _), times in p.metrics.decisions.items() if source == pb.SOURCE_EMBEDDED)
    checked = embedded if about.first == "embedded" else 0  # of others none is
    async with asyncio.timeout(30):
        while (  # noqa: ASYNC110 - plain counts
            p.admission.in_flight
            or p.replies.owed
            or p.replies.waiting
            or sum(p.check.fates.values()) < checked
            or sum(p.shadow.fates().values()) < p.shadow.offered
        ):
            await asyncio.sleep(0.001)
    decisions: list[Any] = []
    allowed_us = []
    for outcome in outcomes:
        if isinstance(outcome, str):
            decisions.append(outcome)
            continue
        wire = outcome if isinstance(outcome, bytes) else outcome.wire
        decision = pb.Decision.FromString(wire)
        decisions.append(_meaning(decision, about))
        allowed_us.append(decision.budget.allowed_us)
    metrics = p.metrics
    counted = {
        "decisions": +metrics.decisions,
        "reasons": +metrics.reasons,
        "degradations": +metrics.degradations,
        "attempts": +p.champion.attempts,
        "broken": +p.chain.broken,
        "objective": (p.objective.met, p.objective.missed),
        "latency": metrics.latency.buckets()[0][-1],
        "stages": {stage: one.buckets()[0][-1] for stage, one in metrics.stages.items()},
        "skips": +metrics.skips,
        "late": metrics.late,
        "cancelled": metrics.cancelled,
        "shadow": p.shadow.fates(),
        "remembered": {asked: one.answer.model_version for asked, one in p.cached_scores._scores.items()},
        "canary": (p.routing.answered, p.routing.passed_over),
        # A champion that cannot be asked is told of once more where no other stage takes the block.
        "observed": set(+p.observed) if about.out else +p.observed,
        "checks": dict(p.check.fates),
        "unconfirmed": dict(p.replies.unconfirmed),
    }
    in_columns = round(metrics.blocks.buckets()[1])
    alone = {str(why): times for why, times in metrics.alone.items() if times}
    await p.journal.flush()
    return Found(decisions, counted, [], allowed_us, in_columns, alone)


def _meaning(message: Any, about: Circumstances) -> Any:
    """What a decision or its packet says, without what goes by who comes first, which is nobody's business.

    This is with whom a row is scored, and which of a strategy's orders may trade at its rate. How many may is not.
    """
    said = meaning(message)
    for attempt in said.get("attempts", ()):
        attempt.pop("batch_rows", None)
        attempt.pop("batch_index", None)
    if about.guards.max_decisions_per_second is not None:
        decision = said.get("decision", said)
        reasons = [one for one in decision["reasons"] if one != "REASON_CODE_STRATEGY_RATE"]
        if len(reasons) < len(decision["reasons"]):
            decision |= {"reasons": reasons}
            if decision["action"] == "ACTION_NO_TRADE":  # else it abstains for another reason, as the others do
                decision |= {"action": "ACTION_TRADE"}
    return said


_UNUSUAL: Final[dict[str, st.SearchStrategy[Any]]] = {
    "markets": st.tuples(*[st.sampled_from(("fresh", "stale", "unknown", "missing", "no mid", "odd"))] * 3),
    "scores": st.tuples(*[st.sampled_from((0.9, 0.1, 0.5, 1.0, 0.0, -0.0, math.nan, 1.5, -0.1, math.inf))] * 6),
    "failure": st.sampled_from((Outcome.TRANSPORT, Outcome.OVERLOAD, Outcome.MODEL_ERROR)),
    "secondary_fails": st.just(True),
    "out": st.sampled_from((("primary",), ("secondary",), ("primary", "secondary"))),
    "state": st.sampled_from((admin_pb2.TRADING_STATE_REDUCING, admin_pb2.TRADING_STATE_HALTED)),
    "guards": st.builds(
        GuardSettings,
        price_collar_bps=st.sampled_from((50.0, None, 1.0)),
        max_notional=st.sampled_from((100_000.0, None, 50.0)),
        limits=st.sampled_from(
            (
                (),
                (OrderLimit(instrument=INSTRUMENTS[0], max_quantity=0.7),),
                (OrderLimit(strategy="vwap", max_notional=60.0), OrderLimit(max_quantity=1_000.0)),
            )
        ),
        max_decisions_per_second=st.sampled_from((None, 3.0)),
        degraded_orders=st.sampled_from(("any", "reduce_only")),
        model_grace_days=st.sampled_from((0.0, 3_650.0)),
    ),
    "limits": st.sampled_from(("band", "domain", "unknown")),
    "expires": st.sampled_from(("later", "long ago")),
    "first": st.just("embedded"),
    "is_embedded": st.just(False),
    "chain": st.sampled_from(
        (
            ("model", "rules"),
            ("model", "embedded", "rules"),
            ("model", "embedded", "rules"),
            ("rules", "model"),
            ("cached_score", "rules"),
        )
    ),
    "control_is_stale": st.just(True),
    "shadow": st.just(True),
    "canary": st.sampled_from(("sound", "sound", "fails", "other version", "odd")),
    "canary_weight": st.sampled_from((0.5, 1.0, 1.0, 0.0)),
    "canary_of": st.just("twap"),
    "journal": st.just("full"),
}
"""What may be otherwise, and how."""
