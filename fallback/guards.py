"""Guards: evaluated last, over whatever source answered. They only ever make an answer safer.

A guard that cannot be evaluated (no mid to hold a price against) objects. A new guard objects in `_order_objections`,
or in `_evidence_objections` and `settle_block`, with a reason of its own in decision.proto. What a model says of its
own limits is held against its scores in `model_limits.py`, for orders that are decided together; there, what cannot be
known is a degradation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator, model_validator

from fallback.model_limits import LimitGuards, limits_unknown
from fallback.order import MODEL_SOURCES, Answer, Case, Order, Reasons
from feature_cache.token_bucket import TokenBuckets
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb

if TYPE_CHECKING:
    from fallback.block import Block
    from feature_cache.store.codec import FeatureSnapshot

_log = structlog.get_logger(__name__)

_DAY_SECONDS: Final = 86_400.0
_REPORT_SECONDS: Final = 60.0
"""Between two log lines about a model whose limits could not be held against a score: every order may meet that bug."""
_BURST_SECONDS: Final = 1.0
"""A burst of a strategy may have as many orders as its rate allows in this time."""


Guarded = tuple[pb.Action.ValueType, list[pb.ReasonCode.ValueType]]
"""The action after all guards, and the reasons."""


class OrderLimit(BaseModel):
    """Largest order of an instrument, of a strategy, or of a strategy in an instrument."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instrument: str | None = Field(default=None, min_length=1)
    """`SYMBOL.VENUE`; unset: every instrument."""
    strategy: str | None = Field(default=None, min_length=1)
    """Unset: every strategy."""
    max_quantity: PositiveFloat | None = None
    """Largest quantity, in base asset."""
    max_notional: PositiveFloat | None = None
    """Largest notional, in quote currency, reckoned as the general limit is."""

    @model_validator(mode="after")
    def _limits_something(self) -> OrderLimit:
        if self.max_quantity is None and self.max_notional is None:
            raise ValueError("a limit needs max_quantity or max_notional")
        return self


class GuardSettings(BaseModel):
    """Limits that no answer may cross. `PRETRADE_GUARDS='{"max_notional": null}'` switches a limit off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    price_collar_bps: float | None = Field(default=100.0, gt=0)
    """How far a limit price may lie on the paying side of the mid, in basis points. Set it to what your risk policy
    calls a mistyped price."""
    max_notional: float | None = Field(default=1_000_000.0, gt=0)
    """Largest order, in quote currency: at the higher of limit price and mid, and for a market order at the mid."""
    limits: tuple[OrderLimit, ...] = ()
    """Further limits by instrument and strategy; a JSON list of objects of `instrument`, `strategy`, `max_quantity`
    (base asset) and `max_notional` (quote currency). Every one that applies to an order holds."""
    max_decisions_per_second: float | None = Field(default=None, gt=0)
    """Orders a second that may trade, for each strategy and in each server process; a burst may have one second's
    worth. Set it to stop a strategy that runs wild. Unset: any number."""
    degraded_orders: Literal["any", "reduce_only"] = "any"
    """Orders that may trade when the cached score or the rules answered instead of a model: `any`, or only
    `reduce_only` orders."""
    model_grace_days: float = Field(default=0.0, ge=0, le=3_650)
    """How long a model may go on deciding after it has expired, in days. Raise it, knowing that its market is older
    than whoever trained it wanted, where no newer model is ready."""

    @field_validator("limits")
    @classmethod
    def _each_once(cls, limits: tuple[OrderLimit, ...]) -> tuple[OrderLimit, ...]:
        if len({(limit.instrument, limit.strategy) for limit in limits}) < len(limits):
            raise ValueError("two limits for the same instrument and strategy")
        return limits


class Guards:
    """Evaluates every guard and makes the answer as safe as they ask.

    The trading state and limits turn TRADE into NO_TRADE; unusable features, an expired model and a score outside of
    what the model knows turn it into ABSTAIN. An answer that is not TRADE keeps its action and only gains the reasons.

    Args:
        settings: The limits.
        trading_state: In force.
        clock: Monotonic seconds.
        wall_clock: Seconds since the Unix epoch.
        models: Hold models to their own limits; None for models without.
    """

    def __init__(
        self,
        settings: GuardSettings,
        trading_state: Callable[[], admin_pb2.TradingState.ValueType],
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        models: LimitGuards | None = None,
    ) -> None:
        self.configure(settings)
        self._trading_state = trading_state
        self._clock = clock
        self._wall_clock = wall_clock
        self._models = models
        # No strategy's bucket fills up because a caller invents the names of others.
        self._rates = TokenBuckets(math.inf, _BURST_SECONDS, clock, most_names=None)
        """Of the strategies."""
        self._next_report = -math.inf

    def configure(self, settings: GuardSettings) -> None:
        """Goes by these limits from the next answer on."""
        self._settings = settings
        self._collar_bps = math.inf if settings.price_collar_bps is None else settings.price_collar_bps
        self._most_notional = math.inf if settings.max_notional is None else settings.max_notional
        self._limits = {(limit.instrument, limit.strategy): limit for limit in settings.limits}
        self._only_reducing_without_model = settings.degraded_orders == "reduce_only"
        self.model_grace_seconds = settings.model_grace_days * _DAY_SECONDS
        """How long models may decide after their expiry."""

    def look(self, cases: Sequence[Case], answers: Sequence[Answer]) -> Sequence[Reasons]:
        """What models' own limits object to each of the answers, in one go: an argument of `apply`.

        It never raises. A bug that one order meets is none of the others' business, and costs it no answer: its model's
        limits are not known then.
        """
        try:
            return self._objections(cases, answers)
        except Exception:
            return [self._look_at(case, answer) for case, answer in zip(cases, answers, strict=True)]

    def _objections(self, cases: Sequence[Case], answers: Sequence[Answer]) -> Sequence[Reasons]:
        return [()] * len(cases) if self._models is None else self._models.objections(cases, answers)

    def _look_at(self, case: Case, answer: Answer) -> Reasons:
        try:
            return self._objections((case,), (answer,))[0]
        except Exception:
            limits_unknown(case)
            now = self._clock()
            if now >= self._next_report:
                self._next_report = now + _REPORT_SECONDS
                _log.exception("a model's limits could not be looked at", version=answer.model_version)
            return ()

    def apply_together(self, cases: Sequence[Case], answers: Sequence[Answer]) -> list[Guarded | Exception]:
        """`apply` for cases that are decided together: what it gives for each, or the error that it meets.

        Nearly all orders meet no objection, which one look shows. The others are looked at more closely.
        """
        beyond_limits = self.look(cases, answers)
        started = self._clock()
        try:
            are_clear = self._are_clear(cases, answers, beyond_limits)
        except Exception:  # whose it is shows when each is looked at
            are_clear = [False] * len(cases)
        used = self._clock() - started
        found: list[Guarded | Exception] = []
        for case, answer, reasons, is_clear in zip(cases, answers, beyond_limits, are_clear, strict=True):
            if is_clear:
                left = case.budget.deadline - started
                case.budget.charge(pb.STAGE_GUARDS, left if left > 0.0 else 0.0, used)
                found.append((answer.action, [answer.reason]))
                continue
            try:
                found.append(self.apply(case, answer, reasons))
            except Exception as error:  # a bug that one order meets is none of the others' business
                found.append(error)
        return found

    def _are_clear(
        self, cases: Sequence[Case], answers: Sequence[Answer], beyond_limits: Sequence[Reasons]
    ) -> list[bool]:
        """Whether a look shows that no guard objects: what `_apply` asks, in one go; False where it takes more."""
        settings = self._settings
        if settings.max_decisions_per_second is not None or self._trading_state() != admin_pb2.TRADING_STATE_ACTIVE:
            return [False] * len(cases)
        return [
            not reasons
            and case.features_problem is None
            and answer.source in MODEL_SOURCES
            and not (answer.model_expires_at and self._has_expired(case, answer))
            and self._is_within(case.order, case.mid)
            for case, answer, reasons in zip(cases, answers, beyond_limits, strict=True)
        ]

    def settle_block(self, block: Block) -> Collection[int]:
        """Writes into an answered block what `apply` says of its orders; the places of those it must be asked for.

        The latter are orders that a degradation goes with. Of the others::

            abstain = (the model expired before the market's time) or (the score is beyond the model's limits)
            action  = ABSTAIN if abstain, NO_TRADE if the order itself is objected to, else as answered

        and only a TRADE is changed. What trades then is taken from its strategy's bucket, and is NO_TRADE where that
        is empty.
        """
        model, state = block.model, self._trading_state()
        assert model is not None
        beyond: Mapping[int, Reasons] = {}
        alone: Collection[int] = ()
        if self._models is not None:
            beyond, alone = self._models.of_block(block)
        valid_until = model.expires_at + self.model_grace_seconds if model.expires_at else math.inf
        is_active, found = state == admin_pb2.TRADING_STATE_ACTIVE, dict[int, Reasons]()
        for place, (order, view) in enumerate(zip(block.orders, block.views, strict=True)):
            is_valid = valid_until == math.inf or self._market_seconds_of(view.snapshot) < valid_until
            if is_active and is_valid and place not in beyond and self._is_within(order, view.mid):
                continue
            reasons = [] if is_valid else [pb.REASON_CODE_MODEL_EXPIRED]
            reasons += beyond.get(place, ())
            must_abstain = bool(reasons)
            self._order_objections(order, view.mid, state, reasons)
            if reasons:
                found[place] = tuple(reasons)
                if block.actions[place] == pb.ACTION_TRADE:
                    block.actions[place] = pb.ACTION_ABSTAIN if must_abstain else pb.ACTION_NO_TRADE
        self._hold_to_rates(block, alone, found)
        if found:
            block.objections = [found.get(place, ()) for place in range(len(block))]
        return alone

    def _hold_to_rates(self, block: Block, alone: Collection[int], found: dict[int, Reasons]) -> None:
        """Takes the orders of a block that would trade from their strategies' buckets; objects to those beyond."""
        rate = self._settings.max_decisions_per_second
        if rate is None:
            return
        trading: dict[str, list[int]] = {}
        for place, order in enumerate(block.orders):
            if block.actions[place] == pb.ACTION_TRADE and place not in alone:
                trading.setdefault(order.strategy, []).append(place)
        for strategy, places in trading.items():
            for place in places[self._rates.take_some(len(places), strategy, rate) :]:
                found[place] = (pb.REASON_CODE_STRATEGY_RATE,)
                block.actions[place] = pb.ACTION_NO_TRADE

    def apply(self, case: Case, answer: Answer, beyond_limits: Reasons | None = None) -> Guarded:
        """The action after all guards, and the reasons: the answer's own first, then each objection.

        Args:
            case: What was asked.
            answer: What was answered.
            beyond_limits: What `look` found; None to look now, and to raise what goes wrong.
        """
        return self._apply(case, answer, beyond_limits, is_repeat=False)

    def again(self, case: Case, answer: Answer) -> Guarded:
        """The same for an answer that was given before and is to be given again; it counts for no rate."""
        return self._apply(case, answer, self._look_at(case, answer), is_repeat=True)

    def _apply(self, case: Case, answer: Answer, beyond_limits: Reasons | None, is_repeat: bool) -> Guarded:
        started = self._clock()
        reasons = [answer.reason]
        if beyond_limits is None:
            (beyond_limits,) = self._objections((case,), (answer,))
        must_abstain = self._evidence_objections(case, answer, beyond_limits, reasons)
        is_held_against_mid = case.features_problem is None or 0 < case.mid < math.inf
        # Otherwise the evidence's own objection already says why there is nothing to hold the order against.
        self._order_objections(case.order, case.mid, self._trading_state(), reasons, is_held_against_mid)
        if answer.source not in MODEL_SOURCES and self._only_reducing_without_model and not case.order.reduce_only:
            reasons.append(pb.REASON_CODE_NO_MODEL_REDUCE_ONLY)
        action = answer.action
        would_trade = action == pb.ACTION_TRADE and len(reasons) == 1
        if would_trade and not is_repeat and self._rate_exceeded(case.order.strategy):
            reasons.append(pb.REASON_CODE_STRATEGY_RATE)
        if action == pb.ACTION_TRADE and len(reasons) > 1:
            action = pb.ACTION_ABSTAIN if must_abstain else pb.ACTION_NO_TRADE
        left = case.budget.deadline - started
        case.budget.charge(pb.STAGE_GUARDS, left if left > 0.0 else 0.0, self._clock() - started)
        return action, reasons

    def _evidence_objections(
        self, case: Case, answer: Answer, beyond_limits: Reasons, reasons: list[pb.ReasonCode.ValueType]
    ) -> bool:
        """Objections to what the answer rests on."""
        before = len(reasons)
        if case.features_problem is not None:
            reasons.append(case.features_problem)
        if answer.model_expires_at and self._has_expired(case, answer):
            reasons.append(pb.REASON_CODE_MODEL_EXPIRED)
        reasons += beyond_limits
        return len(reasons) > before

    def _has_expired(self, case: Case, answer: Answer) -> bool:
        return self._market_seconds(case) >= answer.model_expires_at + self.model_grace_seconds

    def _market_seconds(self, case: Case) -> float:
        """The instant of the market that is decided on, Unix seconds; where none is known that of the wall clock.

        It is the market that a model no longer knows: a recording that is replayed a year later is the market of its
        own time. The feature engine holds a venue's wrong time within a second of its feed.
        """
        return self._market_seconds_of(case.snapshot)

    def _market_seconds_of(self, snapshot: FeatureSnapshot | None) -> float:
        known_ns = 0 if snapshot is None else snapshot.event_time_ns
        return known_ns / 1e9 if known_ns else self._wall_clock()

    def _order_objections(
        self,
        order: Order,
        mid: float,
        state: admin_pb2.TradingState.ValueType,
        reasons: list[pb.ReasonCode.ValueType],
        is_held_against_mid: bool = True,
    ) -> None:
        """Objections to the order itself."""
        if state == admin_pb2.TRADING_STATE_REDUCING:
            if not order.reduce_only:
                reasons.append(pb.REASON_CODE_TRADING_REDUCING)
        elif state != admin_pb2.TRADING_STATE_ACTIVE:
            reasons.append(pb.REASON_CODE_TRADING_HALTED)
        if is_held_against_mid:
            self._price_objections(order, mid if 0 < mid < math.inf else math.nan, reasons)
        if self._limits and not order.quantity <= self._most(order, "max_quantity", math.inf):
            reasons.append(pb.REASON_CODE_QUANTITY_LIMIT)

    def _price_objections(self, order: Order, mid: float, reasons: list[pb.ReasonCode.ValueType]) -> None:
        """Objections that hold the order against the mid; see `_is_within` for the formulas."""
        is_market = math.isnan(order.limit_price)
        if self._collar_bps < math.inf and not is_market:
            direction = 1 if order.side == pb.SIDE_BUY else -1
            paid_bps = direction * (order.limit_price / mid - 1) * 1e4
            if not paid_bps <= self._collar_bps:
                reasons.append(pb.REASON_CODE_PRICE_COLLAR)
        most = self._most_notional
        if self._limits:
            most = self._most(order, "max_notional", most)
        if most < math.inf:
            # Without a mid, `max` keeps the limit price; a market order then objects.
            price = mid if is_market else max(order.limit_price, mid)
            if not order.quantity * price <= most:
                reasons.append(pb.REASON_CODE_NOTIONAL_LIMIT)

    def _is_within(self, order: Order, mid: float) -> bool:
        """Whether `_price_objections` and the limits of quantity have none; False without a mid, too.

        With d = 1 for a buy and -1 for a sell, and the mid as the price of a market order::

            d * (limit_price / mid - 1) * 10,000 <= collar_bps      (limit orders alone)
            quantity * max(limit_price, mid)     <= max_notional
            quantity                             <= max_quantity
        """
        if not 0 < mid < math.inf:
            return False
        price, collar_bps, most = order.limit_price, self._collar_bps, self._most_notional
        if self._limits:
            most = self._most(order, "max_notional", most)
            if not order.quantity <= self._most(order, "max_quantity", math.inf):
                return False
        if price != price:  # noqa: PLR0124 - NaN: a market order
            return order.quantity * mid <= most
        direction = 1 if order.side == pb.SIDE_BUY else -1
        is_near = direction * (price / mid - 1) * 1e4 <= collar_bps
        return is_near and order.quantity * max(price, mid) <= most

    def _most(self, order: Order, what: Literal["max_quantity", "max_notional"], most: float) -> float:
        """The smallest of `most` and the limits that apply to an order."""
        for instrument in (order.instrument, None):
            for strategy in (order.strategy, None):
                limit = self._limits.get((instrument, strategy))
                if limit is not None:
                    most = min(most, getattr(limit, what) or math.inf)
        return most

    def _rate_exceeded(self, strategy: str) -> bool:
        """Takes one from the strategy's bucket; only orders that would trade do."""
        rate = self._settings.max_decisions_per_second
        return rate is not None and not self._rates.take(strategy, rate)
