"""Writes down what decisions rest on, as entries of the journal.

Decisions that become durable together are one entry, a `DecisionBatch`: what they have in common is in it once. The
event loop only collects them (`PacketBatch.add`). The journal's thread makes the entry of them (`PacketBatch.entry`),
when it knows which of them share a commit: by `entry_wire_c.pyx` where it is compiled, else plainly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import starmap
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fallback.order import MODEL_SOURCES, NO_CONTEXT
from feature_cache import features
from feature_cache.compiled import compiled
from feature_cache.store.codec import BookState
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.control.state import ControlState
from server.decision import decision_wire
from server.inference import model_sets
from server.inference.model_names import DEFAULT
from server.journal.entries import NO_AGE
from server.journal.protowire import prefixed, template

if TYPE_CHECKING:
    from fallback.order import Answer, Attempt, CallContext, Case, Order, Part
    from feature_cache.feature_set import FeatureSet, SetRow
    from feature_cache.store.codec import FeatureSnapshot
    from server.decision.decided_block import DecidedBlock
    from server.decision.record import Decided, RecordedRow

_BOOK_AGE: Final = features.MF1.index["book_age_ms"]
_BOOK_STATES: Final = {
    BookState.UNKNOWN: packet_pb2.BOOK_STATE_UNKNOWN,
    BookState.VALID: packet_pb2.BOOK_STATE_VALID,
    BookState.LOCKED: packet_pb2.BOOK_STATE_LOCKED,
}
_ORDER: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "order")
_FEATURES: Final = template(pb.Order.DESCRIPTOR, "features")
_FROM_CALLER: Final = packet_pb2.DecisionPacket(
    features=packet_pb2.FeatureProvenance(from_caller=True)
).SerializeToString()
_CHAIN_STAGE: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "chain_stages")
_CACHED_FROM: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "cached_from_decision_id")
_CONTEXT: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "trace_id", "correlation_id")
_CALLER: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "caller")
_SCORED_INPUT: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "scored_input")
_SCORED_SET: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "scored_feature_set")
_CHOSEN_MODEL: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "chosen_model")
_UNNAMED: Final = frozenset(("", DEFAULT))
"""What the model map says of an order that goes to the default model, or that it was not asked for."""
_PARTS: Final = 1024
"""Parts that are kept for the next entries."""


class _Shared(NamedTuple):
    """What all decisions have while neither settings nor control state change."""

    instance_id: str
    config_hash: str
    durability: str
    trading_state: str
    flags_on: tuple[str, ...]
    control_version: int


class PacketBatch:
    """Decisions on their way to the journal; `len` is how many. Made by `PacketWriter.batch`."""

    __slots__ = ("_count", "_rows", "_shared")

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        self._rows: list[RecordedRow | DecidedBlock] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, case: Case, answer: Answer, decided: Decided, now: float, wall_ns: int) -> None:
        """Adds a decision that was made just now.

        Args:
            case: What was asked, and what was known.
            answer: What the source said.
            decided: The decision.
            now: Monotonic seconds.
            wall_ns: The same instant, nanoseconds since the Unix epoch.
        """
        self._count += 1
        self._rows.append(
            (
                case,
                answer,
                case.order,
                decided.decision_id,
                decided.action,
                bytes(decided.reasons),
                bytes(case.degradations),
                decided.allowed_us,
                decided.used_us,
                case.budget.uses.copy(),
                tuple(case.attempts),
                wall_ns,
                int(now * 1e9),
            )
        )

    def add_block(self, decided: DecidedBlock) -> None:
        """Adds decisions that were made in columns just now."""
        self._count += len(decided)
        self._rows.append(decided)

    def entry(self, others: Iterable[PacketBatch] = ()) -> bytes:
        """The serialised journal entry of these decisions, and of those of other batches that `can_join` says."""
        rows = self._rows
        for other in others:
            rows = rows + other._rows
        if _compiled is None:
            return write_entry_plainly(self._shared, rows)
        entry: bytes = _compiled.write_entry(_shared_wire(self._shared), rows, _PART_WRITERS)
        return entry

    def can_join(self, other: PacketBatch) -> bool:
        """True when the decisions of the other batch can be in the same entry."""
        return self._shared is other._shared or self._shared == other._shared


class PacketWriter:
    """Makes batches, and holds what all packets of this process share."""

    def __init__(self, instance_id: str, config_hash: str, durability: str, control: ControlState) -> None:
        self._instance_id = instance_id
        self.config_hash = config_hash
        """Of the settings in force."""
        self._durability = durability
        self._control = control

    def batch(self) -> PacketBatch:
        """A new batch, for decisions under the control state of now."""
        control = self._control
        return PacketBatch(
            _Shared(
                self._instance_id,
                self.config_hash,
                self._durability,
                control.trading_state_name,
                tuple(control.flags_on),
                control.version,
            )
        )

    @property
    def control_version(self) -> int:
        """Version of the control state that decisions are made under."""
        return self._control.version

    def settings(self, settings_json: str, software_version: str, wall_ns: int) -> bytes:
        """The serialised journal entry of the settings that packets name by their hash."""
        return packet_pb2.JournalEntry(
            settings=packet_pb2.SettingsInForce(
                config_hash=self.config_hash,
                settings_json=settings_json,
                software_version=software_version,
                instance_id=self._instance_id,
                recorded_at_ns=wall_ns,
            )
        ).SerializeToString()


def write_entry_plainly(shared: _Shared, together: Sequence[RecordedRow | DecidedBlock]) -> bytes:
    """The serialised entry of some decisions. `entry_wire_c.pyx`, where it is compiled, writes the same bytes."""
    rows: list[RecordedRow] = []
    for one in together:
        rows.extend((one,) if isinstance(one, tuple) else one.rows())
    cases, answers, orders, ids, actions, reasons, degradations, allowed, used, ledgers, attempts, walls, nows = zip(
        *rows, strict=True
    )
    entry = packet_pb2.JournalEntry()
    batch = entry.decisions
    batch.shared.CopyFrom(_shared(shared))
    _add_orders(batch, orders)
    keys = [
        (
            action,
            answer.source,
            why,
            degraded,
            answer.model_name,
            answer.model_version,
            answer.threshold if answer.score == answer.score else None,
            answer.model_expires_at,
            answer.parts,
        )
        for action, answer, why, degraded in zip(actions, answers, reasons, degradations, strict=True)
    ]
    batch.answer.extend(_choose(keys, _answer, batch.answers))
    batch.score.extend([answer.score for answer in answers])
    batch.part_score.extend([score for answer in answers for score in answer.part_scores])
    batch.decision_id.extend(ids)
    ages = [case.feature_age_seconds for case in cases]
    batch.feature_age_ns.extend([NO_AGE if age != age else int(age * 1e9) for age in ages])  # noqa: PLR0124 - NaN
    batch.decided_at_ns.extend(walls)
    batch.allowed_us.extend(allowed)
    batch.used_us.extend(used)
    batch.ledger.extend(map(decision_wire.write_stages, ledgers))
    _add_features(batch, cases)
    _add_attempts(batch, attempts)
    batch.arrived_monotonic_ns.extend([int(case.budget.arrived * 1e9) for case in cases])
    batch.decided_monotonic_ns.extend(nows)
    mids = [case.mid for case in cases]
    batch.mid_price.extend([0.0 if mid != mid else mid for mid in mids])  # noqa: PLR0124 - NaN
    rests = {row: rest for row, rest in enumerate(map(_rest, cases, orders, answers)) if rest}
    batch.rest_row.extend(rests)
    batch.rest.extend(rests.values())
    return entry.SerializeToString()


def _add_orders(batch: packet_pb2.DecisionBatch, orders: Sequence[Order]) -> None:
    keys = [
        (
            order.instrument,
            order.side,
            order.strategy,
            order.reduce_only,
            None if order.timeout_seconds is None else order.message.timeout.ToNanoseconds(),
        )
        for order in orders
    ]
    batch.order.extend(_choose(keys, _order, batch.orders))
    batch.order_ref.extend([order.order_ref for order in orders])
    idempotency_keys = [order.idempotency_key for order in orders]
    if "".join(idempotency_keys):
        batch.idempotency_key.extend(idempotency_keys)
    batch.quantity.extend([order.quantity for order in orders])
    batch.limit_price.extend([order.limit_price for order in orders])


def _add_features(batch: packet_pb2.DecisionBatch, cases: Sequence[Case]) -> None:
    vectors: dict[bytes, int] = {}
    rows = [None if case.features is None else case.row() for case in cases]
    batch.model_input.extend([0 if row is None else vectors.setdefault(row, len(vectors) + 1) for row in rows])
    batch.model_inputs.extend(vectors)
    if vectors:
        batch.feature_set_id = features.MF1.id
    snapshots = [case.snapshot for case in cases]
    known = {id(snapshot): snapshot for snapshot in snapshots if snapshot is not None}
    numbers = {one: number for number, one in enumerate(known, 1)}
    batch.book.extend([numbers.get(id(snapshot), 0) for snapshot in snapshots])
    batch.books.extend(map(_book, known.values()))
    ages = [math.nan if case.snapshot is None else case.snapshot_age_seconds for case in cases]
    batch.age_seconds.extend(ages)
    batch.age_us.extend([0 if age != age else int(age * 1e6) for age in ages])  # noqa: PLR0124 - NaN differs from itself


def _add_attempts(batch: packet_pb2.DecisionBatch, attempts: Sequence[tuple[Attempt, ...]]) -> None:
    batch.attempt_count.extend(map(len, attempts))
    each = [attempt for of_row in attempts for attempt in of_row]
    keys = [(one.replica, one.outcome, one.model_version, one.batch_rows) for one in each]
    batch.attempt.extend(_choose(keys, _attempt, batch.attempts))
    batch.attempt_used_us.extend([max(0, int(one.used_seconds * 1e6)) for one in each])
    batch.attempt_batch_index.extend([one.batch_index for one in each])


def _choose(keys: Sequence[tuple[Any, ...]], part: Callable[..., Any], table: Any) -> list[int]:
    """Puts a part into the table for each different key; returns which of them each row has."""
    index: dict[tuple[Any, ...], int] = {}
    column = [index.setdefault(key, len(index) + 1) for key in keys]
    table.extend(list(starmap(part, index)))
    return column


@lru_cache(maxsize=16)
def _shared(shared: _Shared) -> packet_pb2.DecisionPacket:
    return packet_pb2.DecisionPacket(
        instance_id=shared.instance_id,
        config_hash=shared.config_hash,
        durability=shared.durability,
        trading_state=shared.trading_state,
        flags_on=shared.flags_on,
        decision=pb.Decision(control_version=shared.control_version),
    )


@lru_cache(maxsize=16)
def _shared_wire(shared: _Shared) -> bytes:
    return _shared(shared).SerializeToString()


@lru_cache(maxsize=_PARTS)
def _order(
    instrument: str, side: pb.Side.ValueType, strategy: str, reduce_only: bool, timeout_ns: int | None
) -> pb.Order:
    order = pb.Order(instrument=instrument, side=side, strategy=strategy, reduce_only=reduce_only)
    if timeout_ns is not None:
        order.timeout.FromNanoseconds(timeout_ns)
    return order


@lru_cache(maxsize=_PARTS)
def _answer(
    action: pb.Action.ValueType,
    source: pb.Source.ValueType,
    reasons: bytes,
    degradations: bytes,
    model_name: str,
    model_version: str,
    threshold: float | None,
    model_expires_at: int,
    parts: tuple[Part, ...],
) -> packet_pb2.DecisionPacket:
    decision = pb.Decision(
        action=action,
        source=source,
        reasons=reasons,  # type: ignore[arg-type]  # iterating over bytes gives the numbers
        degradations=degradations,  # type: ignore[arg-type]
        model_name=model_name,
        model_version=model_version,
        threshold=threshold,
    )
    of_parts = [pb.PartScore(model_version=part.version, weight=part.weight) for part in parts]
    return packet_pb2.DecisionPacket(decision=decision, model_expires_at=model_expires_at, parts=of_parts)


@lru_cache(maxsize=_PARTS)
def _attempt(replica: str, outcome: str, model_version: str, batch_rows: int) -> packet_pb2.Attempt:
    return packet_pb2.Attempt(replica=replica, outcome=outcome, model_version=model_version, batch_rows=batch_rows)


@lru_cache(maxsize=_PARTS)
def _order_wire(*kind: Any) -> bytes:
    return _order(*kind).SerializeToString()


@lru_cache(maxsize=_PARTS)
def _answer_wire(*kind: Any) -> bytes:
    return _answer(*kind).SerializeToString()


@lru_cache(maxsize=_PARTS)
def _attempt_wire(*kind: Any) -> bytes:
    return _attempt(*kind).SerializeToString()


def _book_wire(snapshot: FeatureSnapshot) -> bytes:
    return _book(snapshot).SerializeToString()


_books: Final[dict[str, tuple[FeatureSnapshot, packet_pb2.FeatureProvenance]]] = {}
"""What is known of each instrument, from its newest snapshot. The writer's thread alone uses it."""


def _book(snapshot: FeatureSnapshot) -> packet_pb2.FeatureProvenance:
    """What the server knew of the instrument: the same until its next snapshot."""
    before = _books.get(snapshot.instrument)
    if before is None or before[0] is not snapshot:
        book = packet_pb2.FeatureProvenance(
            sequence=snapshot.sequence,
            event_time_ns=snapshot.event_time_ns,
            book_state=_BOOK_STATES[snapshot.state],
            book_age_ms=snapshot.values[_BOOK_AGE],
        )
        before = _books[snapshot.instrument] = (snapshot, book)
    return before[1]


def _rest(case: Case, order: Order, answer: Answer) -> bytes:
    """What few decisions have: a serialised `DecisionPacket`."""
    rest = _stages(case.stages)
    if order.brings_features:
        given = order.message.features.SerializeToString()
        rest += _ORDER % prefixed(_FEATURES % prefixed(given))
        if order.caller_features is not None:
            rest += _FROM_CALLER
    scored_others = case.others if answer.source in MODEL_SOURCES else None
    rest += _of_model(case.model, scored_others, answer.model_version)
    if answer.cached_from:
        rest += _CACHED_FROM % prefixed(answer.cached_from.encode())
    rest += _context(order.context)
    if order.idempotency_key and order.caller:
        rest += _CALLER % prefixed(order.caller.encode())
    return rest


def _rest_in_block(
    stages: tuple[str, ...],
    chosen: str,
    others: Mapping[FeatureSet, SetRow | None] | None,
    version: str,
    context: CallContext,
) -> bytes:
    """What `_rest` says of an order that was decided in columns."""
    return _stages(stages) + _of_model(chosen, others, version) + _context(context)


def _stages(stages: tuple[str, ...]) -> bytes:
    return b"".join([_CHAIN_STAGE % prefixed(name.encode()) for name in stages])


def _context(context: CallContext) -> bytes:
    if context is NO_CONTEXT:
        return b""
    return _CONTEXT % (prefixed(context.trace_id.encode()), prefixed(context.correlation_id.encode()))


def _of_model(chosen: str, others: Mapping[FeatureSet, SetRow | None] | None, version: str) -> bytes:
    """What the map chose, and what the version scored, if that was of another set than `mf1`."""
    rest = b"" if others is None else _scored(others.get(model_sets.of(version)))
    return rest if chosen in _UNNAMED else rest + _CHOSEN_MODEL % prefixed(chosen.encode())


def _scored(row: SetRow | None) -> bytes:
    """What a model of another set than `mf1` scored."""
    if row is None:
        return b""
    return _SCORED_INPUT % prefixed(row) + _SCORED_SET % prefixed(row.feature_set.version.encode())


_compiled: Final = compiled("server.decision.entry_wire_c")
_PART_WRITERS: Final = (_order_wire, _answer_wire, _attempt_wire, _book_wire, _rest, _rest_in_block)
