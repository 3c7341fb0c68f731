"""Shadow calls: decided rows mirrored to the model that did not decide, after the reply, never waited for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fallback.order import CHAMPION_SOURCES
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.rows import Result, Row, RowBlock, Scored

if TYPE_CHECKING:
    from fallback.block import Block, Scores, View
    from fallback.order import Answer, Case, Order
    from server.inference.pool import Role
    from server.inference.replica import Replica


class Opinion(NamedTuple):
    """What one model says of a row."""

    version: str
    score: float
    threshold: float

    @property
    def trades(self) -> bool:
        """True for TRADE."""
        return self.score >= self.threshold


class Pair(NamedTuple):
    """A row that both the champion and a challenger scored."""

    decision_id: str
    instrument: str
    side: pb.Side.ValueType
    mid: float
    """When it was decided; NaN when unknown."""
    champion: Opinion
    challenger: Opinion
    challenger_decided: bool
    """True when the challenger's score decided, as a canary's, and the champion's is the shadow."""
    challenger_seconds: float
    """Time of the challenger's batch, from its leaving to its answer; for a canary's own order that of its attempt."""
    sequence: int | None
    """Of the server's vector that was scored; None if the features were the caller's own."""


class Pairs(NamedTuple):
    """Rows that one model decided in columns and one version of the other scored in one call; n of them.

    As an iterable of `each` it has a `Pair` for each row, which is made when somebody asks for it.
    """

    decision_ids: Sequence[str]
    instruments: Sequence[str]
    sides: Sequence[pb.Side.ValueType]
    views: Sequence[View]
    """What was known of each order's instrument."""
    champion_version: str
    champion_threshold: float
    champion_scores: Sequence[float]
    challenger_version: str
    challenger_threshold: float
    challenger_scores: Sequence[float]
    challenger_seconds: float
    """As of a `Pair`."""
    challenger_decided: bool = False
    """The same."""

    def each(self) -> Iterator[Pair]:
        """The rows one by one."""
        return map(self.pair, range(len(self.decision_ids)))

    def pair(self, place: int) -> Pair:
        """The row at this place."""
        view = self.views[place]
        return Pair(
            self.decision_ids[place],
            self.instruments[place],
            self.sides[place],
            view.mid,
            Opinion(self.champion_version, self.champion_scores[place], self.champion_threshold),
            Opinion(self.challenger_version, self.challenger_scores[place], self.challenger_threshold),
            self.challenger_decided,
            self.challenger_seconds,
            view.snapshot.sequence,
        )


class Shadow:
    """Sends rows to the model that did not decide, and compares its scores with the decisions.

    What the champion decided goes to every challenger; what a canary decided goes to the champion. A model that is
    slow, hung or broken costs a decision nothing: its queue is bounded, and rows beyond it are shed and counted. Its
    breaker applies, so a dead one is not even asked.

    A row with a caller's own features is not sent to a version on trial: it might be made to fail there.

    Args:
        challengers: Each gets every sampled row.
        champions: Who serves the champion; one that is available gets a canary's rows.
        sample_share: Share of the decisions that are mirrored; a canary's own always are.
        random: Uniform in [0, 1).
        on_trial: Whether a challenger serves a canary now.
        tells: Whether an order may tell something of the canary.
        observe: Called for every row that two models scored, but for those that `observe_together` is called for.
        observe_together: Called for rows that were decided and scored in columns.
        observe_decision: Called for every decision of a canary.
    """

    def __init__(
        self,
        challengers: Sequence[Role],
        champions: Sequence[Role] = (),
        sample_share: float = 1.0,
        random: Callable[[], float] = lambda: 0.0,
        on_trial: Callable[[Role], bool] = lambda challenger: False,
        tells: Callable[[Order], bool] = lambda order: True,
        observe: Callable[[Pair], None] = lambda pair: None,
        observe_together: Callable[[Pairs], None] = lambda pairs: None,
        observe_decision: Callable[[str], None] = lambda decision_id: None,
    ) -> None:
        self._challengers = tuple(challengers)
        self._champions = tuple(champions)
        self._sample_share = sample_share
        self._random = random
        self._on_trial = on_trial
        self._tells = tells
        self._observe = observe
        self._observe_together = observe_together
        self._observe_decision = observe_decision
        self.offered = 0
        """Rows that should have been mirrored, counted for each model they should have gone to."""
        self.refused = 0
        """Rows not sent because the breaker of their model was open, or features of its set were missing."""
        self.shed = 0
        """Rows not sent because the queue of their model was full."""
        self.agreed = 0
        """Rows on which champion and challenger fell on the same side of their thresholds."""
        self.disagreed = 0
        """Rows on which they did not."""
        self.uncompared = 0
        """Rows the challenger scored and no champion did."""
        self.failed = 0
        """Rows without a usable score."""

    def fates(self) -> dict[str, int]:
        """Rows by what became of them; those under way are missing."""
        return {
            "agreed": self.agreed,
            "disagreed": self.disagreed,
            "uncompared": self.uncompared,
            "failed": self.failed,
            "shed": self.shed,
            "refused": self.refused,
        }

    def mirror(self, decided: Sequence[tuple[Case, Answer, str]]) -> None:
        """Offers the rows of cases that have features, with their answers and ids, to those who did not decide them."""
        by_champion = []
        for one in decided:
            if one[1].source == pb.SOURCE_CANARY:
                self._mirror_canary(*one)
            elif self._sample_share >= 1.0 or self._random() < self._sample_share:
                by_champion.append(one)
        if by_champion:
            for challenger in self._challengers:
                on_trial = self._on_trial(challenger)
                rows = by_champion
                if on_trial:
                    rows = [one for one in by_champion if not one[0].from_caller and self._tells(one[0].order)]
                self._send(challenger.pick(), rows, False, 0.0)

    def mirror_block(self, block: Block, ids: Sequence[str]) -> None:
        """Offers the rows of decisions that one model has made in columns."""
        places: Sequence[int] = range(len(block))
        if block.source == pb.SOURCE_CANARY:
            for decision_id in ids:
                self._observe_decision(decision_id)
            self._offer(self._champion(), block, ids, places)
            return
        if self._sample_share < 1.0:
            places = [place for place in places if self._random() < self._sample_share]
        for challenger in self._challengers:
            wanted = places
            if self._on_trial(challenger):
                wanted = [place for place in places if self._tells(block.orders[place])]
            self._offer(challenger.pick(), block, ids, wanted)

    def _champion(self) -> Replica | None:
        return next((one for role in self._champions if (one := role.pick()) is not None), None)

    def _offer(self, replica: Replica | None, block: Block, ids: Sequence[str], places: Sequence[int]) -> None:
        found = [] if replica is None or not places else block.rows_of(replica.feature_set)
        sent = [place for place in places if found[place] is not None] if found else []
        whole = [row for place in sent if (row := found[place]) is not None]
        rows: list[RowBlock] = []
        if whole:
            mirrored = _MirroredBlock(self._compare, self._compare_together, block, ids, sent)
            rows.append(RowBlock(whole, math.inf, mirrored, math.nan))
        self._submit(replica, rows, len(places))

    def _submit(self, replica: Replica | None, rows: Sequence[Row | RowBlock], offered: int) -> None:
        """Sends rows, and counts what becomes of so many that should have been sent."""
        count = sum(map(len, rows))
        if replica is not None:
            self.shed += count - replica.batcher.submit_shadow(rows)
        self.offered += offered
        self.refused += offered - count

    def _mirror_canary(self, case: Case, answer: Answer, decision_id: str) -> None:
        self._observe_decision(decision_id)
        seconds = case.attempts[-1].used_seconds if case.attempts else 0.0
        self._send(self._champion(), ((case, answer, decision_id),), True, seconds)

    def _send(
        self,
        replica: Replica | None,
        decided: Sequence[tuple[Case, Answer, str]],
        challenger_decided: bool,
        seconds: float,
    ) -> None:
        rows = []
        if replica is not None:
            feature_set = replica.feature_set
            for case, answer, decision_id in decided:
                if (payload := case.row_of(feature_set)) is not None:
                    is_model = challenger_decided or answer.source in CHAMPION_SOURCES
                    mirrored = _Mirrored(
                        self._compare,
                        decision_id,
                        case.order.instrument,
                        case.order.side,
                        case.mid,
                        None if case.from_caller or case.snapshot is None else case.snapshot.sequence,
                        Opinion(answer.model_version, answer.score, answer.threshold) if is_model else None,
                        challenger_decided,
                        seconds,
                    )
                    rows.append(Row(payload, math.inf, mirrored, from_caller=case.is_callers(feature_set)))
        self._submit(replica, rows, len(decided))

    def _compare(self, row: _Mirrored, result: Result) -> None:
        """Compares what a model says of a row with what was decided."""
        if not isinstance(result, Scored):
            self.failed += 1
            return
        decided = row.decided
        if decided is None:
            self.uncompared += 1
            return
        other = Opinion(result.model.version, result.score, result.model.threshold)
        if (other.score >= other.threshold) == (decided.score >= decided.threshold):
            self.agreed += 1
        else:
            self.disagreed += 1
        champion, challenger = (other, decided) if row.challenger_decided else (decided, other)
        self._observe(
            Pair(
                row.decision_id,
                row.instrument,
                row.side,
                row.mid,
                champion,
                challenger,
                row.challenger_decided,
                row.seconds if row.challenger_decided else result.batch_seconds,
                row.sequence,
            )
        )

    def _compare_together(self, pairs: Pairs) -> None:
        """The same for rows that were decided and scored in columns."""
        own, other = pairs.champion_threshold, pairs.challenger_threshold
        both = zip(pairs.champion_scores, pairs.challenger_scores, strict=True)
        agreed = sum([(ours >= own) == (theirs >= other) for ours, theirs in both])
        self.agreed += agreed
        self.disagreed += len(pairs.decision_ids) - agreed
        self._observe_together(pairs)


class _Mirrored:
    """What a comparison needs of a decision, until the row's score is here. It is the row's `Taker`."""

    __slots__ = (
        "challenger_decided",
        "compare",
        "decided",
        "decision_id",
        "instrument",
        "is_done",
        "mid",
        "seconds",
        "sequence",
        "side",
    )

    def __init__(
        self,
        compare: Callable[[_Mirrored, Result], None],
        decision_id: str,
        instrument: str,
        side: pb.Side.ValueType,
        mid: float,
        sequence: int | None,
        decided: Opinion | None,
        challenger_decided: bool = False,
        seconds: float = 0.0,
    ) -> None:
        # Not the case itself: thousands of rows wait for their block.
        self.compare = compare
        self.decision_id = decision_id
        self.instrument = instrument
        self.side = side
        self.mid = mid
        self.sequence = sequence
        self.decided = decided
        """What the model said that decided; None if none did."""
        self.challenger_decided = challenger_decided
        self.seconds = seconds
        self.is_done = False

    def done(self) -> bool:
        """True when it has its result."""
        return self.is_done

    def set_result(self, result: Result) -> None:
        """Compares."""
        self.is_done = True
        self.compare(self, result)


class _MirroredBlock:
    """The same of decisions that were made in columns. It takes what the rows of a `RowBlock` get.

    Args:
        compare: Compares a row that goes on by itself.
        compare_together: Compares all of them.
        block: The decisions.
        ids: Of the decisions.
        places: In the block, of those whose rows were sent.
    """

    __slots__ = (
        "_compare",
        "_compare_together",
        "_decided_seconds",
        "_ids",
        "_instruments",
        "_scores",
        "_sides",
        "_threshold",
        "_version",
        "_views",
        "missing",
    )

    def __init__(
        self,
        compare: Callable[[_Mirrored, Result], None],
        compare_together: Callable[[Pairs], None],
        block: Block,
        ids: Sequence[str],
        places: Sequence[int],
    ) -> None:
        assert block.model is not None
        # Not the orders themselves: thousands of rows wait for their block.
        orders = [block.orders[place] for place in places]
        self._compare = compare
        self._compare_together = compare_together
        self._ids = [ids[place] for place in places]
        self._instruments = [order.instrument for order in orders]
        self._sides = [order.side for order in orders]
        self._views = [block.views[place] for place in places]
        self._scores = [block.scores[place] for place in places]
        self._version, self._threshold = block.model.version, block.model.threshold
        self._decided_seconds = block.used if block.source == pb.SOURCE_CANARY else None
        """What a canary took that has decided; None where the champion has."""
        self.missing = len(orders)
        """Rows without a result."""

    def is_left(self) -> bool:
        """False: the comparison is always wanted."""
        return False

    def has_left(self) -> bool:
        """False."""
        return False

    def is_gone(self, place: int) -> bool:
        """False."""
        return False

    def put_all(self, scores: Scores) -> None:
        """Compares all of them."""
        self.missing = 0
        decided = self._version, self._threshold, self._scores
        other = scores.model.version, scores.model.threshold, scores.values
        rows = self._ids, self._instruments, self._sides, self._views
        if self._decided_seconds is None:
            self._compare_together(Pairs(*rows, *decided, *other, scores[0].batch_seconds))
        else:
            self._compare_together(Pairs(*rows, *other, *decided, self._decided_seconds, challenger_decided=True))

    def put(self, place: int, result: Scored) -> None:
        """Compares one."""
        self._put(place, result)

    def put_failure(self, place: int, result: Result) -> None:
        """Notes that one got no score."""
        self._put(place, result)

    def _put(self, place: int, result: Result) -> None:
        self.missing -= 1
        view = self._views[place]
        decided = Opinion(self._version, self._scores[place], self._threshold)
        alone = _Mirrored(
            self._compare,
            self._ids[place],
            self._instruments[place],
            self._sides[place],
            view.mid,
            view.snapshot.sequence,
            decided,
            self._decided_seconds is not None,
            self._decided_seconds or 0.0,
        )
        alone.set_result(result)
