# cython: language_level=3
"""The compiled twin of `packets.write_entry`, which says what it does.

Each column is a buffer of its own, in the place of its field's number; joined in this order they are the message.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from fallback.block import Scores
from fallback.order import NO_CONTEXT
from feature_cache.features import MF1
from pretrade.audit.v1 import packet_pb2
from server.decision.decision_wire import write_stages
from server.inference.model_map import DEFAULT
from server.journal.entries import NO_AGE

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL

cdef enum:
    FIELDS = 64  # more than there are
    PREFIXED = 2
    LONGEST_VARINT = 10

_BATCH = packet_pb2.DecisionBatch.DESCRIPTOR
_NUMBER = {field.name: field.number for field in _BATCH.fields}
_SET_ID = MF1.id
assert max(_NUMBER.values()) < FIELDS, "a field beyond the table"

cdef int ENTRY = packet_pb2.JournalEntry.DESCRIPTOR.fields_by_name["decisions"].number
cdef int SHARED = _NUMBER["shared"]
cdef int ORDERS = _NUMBER["orders"]
cdef int ANSWERS = _NUMBER["answers"]
cdef int BOOKS = _NUMBER["books"]
cdef int MODEL_INPUTS = _NUMBER["model_inputs"]
cdef int FEATURE_SET = _NUMBER["feature_set_id"]
cdef int ATTEMPTS = _NUMBER["attempts"]
cdef int DECISION_ID = _NUMBER["decision_id"]
cdef int ORDER_REF = _NUMBER["order_ref"]
cdef int IDEMPOTENCY_KEY = _NUMBER["idempotency_key"]
cdef int ORDER = _NUMBER["order"]
cdef int QUANTITY = _NUMBER["quantity"]
cdef int LIMIT_PRICE = _NUMBER["limit_price"]
cdef int ANSWER = _NUMBER["answer"]
cdef int SCORE = _NUMBER["score"]
cdef int FEATURE_AGE = _NUMBER["feature_age_ns"]
cdef int DECIDED_AT = _NUMBER["decided_at_ns"]
cdef int ALLOWED = _NUMBER["allowed_us"]
cdef int USED = _NUMBER["used_us"]
cdef int LEDGER = _NUMBER["ledger"]
cdef int MODEL_INPUT = _NUMBER["model_input"]
cdef int BOOK = _NUMBER["book"]
cdef int AGE_SECONDS = _NUMBER["age_seconds"]
cdef int AGE_US = _NUMBER["age_us"]
cdef int ATTEMPT_COUNT = _NUMBER["attempt_count"]
cdef int ARRIVED = _NUMBER["arrived_monotonic_ns"]
cdef int DECIDED = _NUMBER["decided_monotonic_ns"]
cdef int MID = _NUMBER["mid_price"]
cdef int ATTEMPT = _NUMBER["attempt"]
cdef int ATTEMPT_USED = _NUMBER["attempt_used_us"]
cdef int ATTEMPT_INDEX = _NUMBER["attempt_batch_index"]
cdef int PART_SCORE = _NUMBER["part_score"]
cdef int REST_ROW = _NUMBER["rest_row"]
cdef int REST = _NUMBER["rest"]
cdef long long WITHOUT_AGE = NO_AGE

cdef bint[FIELDS] PACKED
cdef int at
memset(PACKED, 0, sizeof(PACKED))
for field in _BATCH.fields:
    at = field.number
    PACKED[at] = field.is_packed


cdef struct Column:
    char* start
    Py_ssize_t size
    Py_ssize_t room


cdef char* more(Column* column, Py_ssize_t size) except NULL:
    """Makes a column longer; returns the new part."""
    cdef char* start
    if column.size + size > column.room:
        start = <char*> realloc(column.start, 2 * (column.size + size) + 64)
        if start == NULL:
            raise MemoryError
        column.start, column.room = start, 2 * (column.size + size) + 64
    column.size += size
    return column.start + column.size - size


cdef char* varint(char* to, unsigned long long number) noexcept:
    while number >= 0x80:
        to[0] = <char> (number & 0x7F | 0x80)
        number >>= 7
        to += 1
    to[0] = <char> number
    return to + 1


cdef int put(Column* column, unsigned long long number) except -1:
    cdef char* to = more(column, LONGEST_VARINT)
    column.size -= LONGEST_VARINT - (varint(to, number) - to)
    return 0


cdef int put_small(Column* column, unsigned long long number) except -1:
    if number > 0xFFFF_FFFF:
        raise ValueError(f"{number} does not fit into 32 bits")
    return put(column, number)


cdef int put_double(Column* column, double number) except -1:
    memcpy(more(column, 8), &number, 8)  # little-endian, as every machine that this is compiled for
    return 0


cdef int put_float(Column* column, float number) except -1:
    memcpy(more(column, 4), &number, 4)
    return 0


cdef int put_fixed(Column* column, long long number) except -1:
    memcpy(more(column, 8), &number, 8)
    return 0


cdef int put_part(Column* column, int field, const char* content, Py_ssize_t size) except -1:
    """A string, bytes or a message."""
    put(column, field << 3 | PREFIXED)
    put(column, size)
    memcpy(more(column, size), content, size)
    return 0


cdef int put_bytes(Column* columns, int field, bytes content) except -1:
    return put_part(&columns[field], field, PyBytes_AS_STRING(content), PyBytes_GET_SIZE(content))


cdef int put_text(Column* columns, int field, str content) except -1:
    cdef Py_ssize_t size
    cdef const char* text = PyUnicode_AsUTF8AndSize(content, &size)
    return put_part(&columns[field], field, text, size)


cdef int choose(Column* columns, int column, int table, dict known, tuple key, part) except -1:
    """Puts a part into the table unless it is there, and its number into the column."""
    cdef object number = known.get(key)
    if number is None:
        number = known[key] = len(known) + 1
        put_bytes(columns, table, part(*key))
    return put(&columns[column], number)


cdef class _Tables:
    """What is in the tables so far, and how their parts are written."""

    cdef dict orders, answers, attempts, vectors, books
    cdef object order, answer, attempt, book, rest, in_block

    def __cinit__(self, parts):
        self.orders, self.answers, self.attempts, self.vectors, self.books = {}, {}, {}, {}, {}
        self.order, self.answer, self.attempt, self.book, self.rest, self.in_block = parts


cdef int add_order(Column* columns, _Tables tables, order) except -1:
    timeout = None if order.timeout_seconds is None else order.message.timeout.ToNanoseconds()
    key = (order.instrument, order.side, order.strategy, order.reduce_only, timeout)
    choose(columns, ORDER, ORDERS, tables.orders, key, tables.order)
    put_text(columns, ORDER_REF, order.order_ref)
    put_double(&columns[QUANTITY], order.quantity)
    put_double(&columns[LIMIT_PRICE], order.limit_price)
    return 0


cdef int add_answer(Column* columns, _Tables tables, answer, action, bytes reasons, bytes degradations) except -1:
    cdef double score = answer.score
    threshold = answer.threshold if score == score else None
    key = (
        action,
        answer.source,
        reasons,
        degradations,
        answer.model_name,
        answer.model_version,
        threshold,
        answer.model_expires_at,
        answer.parts,
    )
    choose(columns, ANSWER, ANSWERS, tables.answers, key, tables.answer)
    put_double(&columns[SCORE], score)
    for of_part in answer.part_scores:
        put_float(&columns[PART_SCORE], of_part)
    return 0


cdef int add_features(Column* columns, _Tables tables, case) except -1:
    cdef double age
    number = 0
    if case.features is not None:
        vector = case.row()
        number = tables.vectors.get(vector)
        if number is None:
            number = tables.vectors[vector] = len(tables.vectors) + 1
            put_bytes(columns, MODEL_INPUTS, vector)
    put(&columns[MODEL_INPUT], number)
    snapshot = case.snapshot
    if snapshot is None:
        put(&columns[BOOK], 0)
        put_double(&columns[AGE_SECONDS], float("nan"))
        put(&columns[AGE_US], 0)
        return 0
    number = tables.books.get(id(snapshot))
    if number is None:
        number = tables.books[id(snapshot)] = len(tables.books) + 1
        put_bytes(columns, BOOKS, tables.book(snapshot))
    put(&columns[BOOK], number)
    age = case.snapshot_age_seconds
    put_double(&columns[AGE_SECONDS], age)
    put(&columns[AGE_US], <unsigned long long> (<long long> (age * 1e6) if age == age else 0))
    return 0


cdef int add_attempts(Column* columns, _Tables tables, tuple attempts) except -1:
    cdef double used
    put(&columns[ATTEMPT_COUNT], len(attempts))
    for one in attempts:
        key = (one.replica, one.outcome, one.model_version, one.batch_rows)
        choose(columns, ATTEMPT, ATTEMPTS, tables.attempts, key, tables.attempt)
        used = one.used_seconds
        put_small(&columns[ATTEMPT_USED], <unsigned long long> (used * 1e6) if used > 0 else 0)
        put_small(&columns[ATTEMPT_INDEX], one.batch_index)
    return 0


cdef int add(Column* columns, _Tables tables, Py_ssize_t place, tuple row) except -1:
    """Adds a row; see `record.RecordedRow`."""
    cdef double age, mid
    case, answer, order, decision_id, action, reasons, degradations, *rest_of_row = row
    allowed, used, uses, attempts, wall_ns, now_ns = rest_of_row
    put_text(columns, DECISION_ID, decision_id)
    add_order(columns, tables, order)
    add_answer(columns, tables, answer, action, reasons, degradations)
    age = case.feature_age_seconds
    put_fixed(&columns[FEATURE_AGE], <long long> (age * 1e9) if age == age else WITHOUT_AGE)
    put_fixed(&columns[DECIDED_AT], wall_ns)
    put_small(&columns[ALLOWED], allowed)
    put_small(&columns[USED], used)
    put_bytes(columns, LEDGER, write_stages(uses))
    add_features(columns, tables, case)
    add_attempts(columns, tables, attempts)
    put_fixed(&columns[ARRIVED], <long long> (<double> case.budget.arrived * 1e9))
    put_fixed(&columns[DECIDED], now_ns)
    mid = case.mid
    put_double(&columns[MID], mid if mid == mid else 0.0)
    if (
        case.stages
        or (case.model and case.model != DEFAULT)
        or order.brings_features
        or case.others is not None
        or answer.cached_from
        or order.context is not NO_CONTEXT
        or (order.caller and order.idempotency_key)
    ):
        rest = tables.rest(case, order, answer)
        if rest:
            put(&columns[REST_ROW], place)
            put_bytes(columns, REST, rest)
    return 0


cdef unsigned long long microseconds(double since, double until) noexcept:
    """As in decided_block.py."""
    return <unsigned long long> ((until - since) * 1e6) if until > since else 0


cdef int add_block(Column* columns, _Tables tables, Py_ssize_t first, decided) except -1:
    """Adds decisions that were made in columns; see `DecidedBlock.rows`."""
    cdef double age, arrived, used, mid
    cdef Py_ssize_t place, batch_index
    cdef bytes reasons
    block, ids = decided.block, decided.ids
    model, source = block.model, block.source
    cdef list orders = list(block.orders), views = list(block.views), scores = block.scores
    results = block.results
    cdef bint is_one_call = type(results) is Scores  # else each order has a result of its own
    batch_rows, first_index, part_scores = 0, 0, None
    if is_one_call:
        batch_rows, first_index, part_scores = results.batch_rows, results.first_index, results.part_scores
    cdef list actions = block.actions, all_reasons = block.reasons, objections = block.objections
    cdef object wall_ns = decided.wall_ns
    cdef object now_ns = int(decided.recorded_at * 1e9)
    cdef double recorded_at = decided.recorded_at
    cdef list own = None if block.own is None else list(block.own)
    cdef bytes ledger = write_stages(decided.uses)
    cdef bytes after_admission = b"" if own is None else write_stages(decided.uses[1:])
    cdef double deadline = block.budget.deadline
    threshold, expires_at, parts = model.threshold, model.expires_at, model.parts
    name, version, replica = model.name, model.version, block.asked_of
    cdef bytes degradations = bytes(block.degradations)
    arrived, used = block.budget.arrived, block.used
    chosen = block.chosen
    stages = block.stages
    cdef bint is_named = bool(stages) or (bool(chosen) and chosen != DEFAULT)
    cdef dict rests = {}
    for place in range(len(orders)):
        order, view = orders[place], views[place]
        if is_one_call:
            batch_index = <Py_ssize_t> first_index + place
            of_parts = part_scores[place] if parts else None
        else:
            one = results[place]
            batch_rows, batch_index, of_parts = one.batch_rows, one.batch_index, one.part_scores
        put_text(columns, DECISION_ID, ids[place])
        add_order(columns, tables, order)
        reasons = bytes((all_reasons[place],)) if not objections else bytes((all_reasons[place], *objections[place]))
        key = (actions[place], source, reasons, degradations, name, version, threshold, expires_at, parts)
        choose(columns, ANSWER, ANSWERS, tables.answers, key, tables.answer)
        put_double(&columns[SCORE], scores[place])
        if parts:
            for of_part in of_parts:
                put_float(&columns[PART_SCORE], of_part)
        age = view.age_seconds
        put_fixed(&columns[FEATURE_AGE], <long long> (age * 1e9))
        put_fixed(&columns[DECIDED_AT], wall_ns)
        if own is not None:
            arrived, deadline, admission = own[place]
            ledger = write_stages([admission]) + after_admission
        put_small(&columns[ALLOWED], microseconds(arrived, deadline))
        put_small(&columns[USED], microseconds(arrived, recorded_at))
        put_bytes(columns, LEDGER, ledger)
        vector = view.row
        number = tables.vectors.get(vector)
        if number is None:
            number = tables.vectors[vector] = len(tables.vectors) + 1
            put_bytes(columns, MODEL_INPUTS, vector)
        put(&columns[MODEL_INPUT], number)
        snapshot = view.snapshot
        number = tables.books.get(id(snapshot))
        if number is None:
            number = tables.books[id(snapshot)] = len(tables.books) + 1
            put_bytes(columns, BOOKS, tables.book(snapshot))
        put(&columns[BOOK], number)
        put_double(&columns[AGE_SECONDS], age)
        put(&columns[AGE_US], <unsigned long long> (<long long> (age * 1e6)))
        put(&columns[ATTEMPT_COUNT], 1)
        choose(columns, ATTEMPT, ATTEMPTS, tables.attempts, (replica, "success", version, batch_rows), tables.attempt)
        put_small(&columns[ATTEMPT_USED], <unsigned long long> (used * 1e6) if used > 0 else 0)
        put_small(&columns[ATTEMPT_INDEX], batch_index)
        put_fixed(&columns[ARRIVED], <long long> (arrived * 1e9))
        put_fixed(&columns[DECIDED], now_ns)
        mid = view.mid
        put_double(&columns[MID], mid if mid == mid else 0.0)
        context = order.context
        if is_named or view.others is not None or context is not NO_CONTEXT:
            kind = (id(view), id(context))
            rest = rests.get(kind)
            if rest is None:
                rest = rests[kind] = tables.in_block(stages, chosen, view.others, version, context)
            if rest:
                put(&columns[REST_ROW], first + place)
                put_bytes(columns, REST, rest)
    return 0


cdef bytes joined(Column* columns):
    """The entry: the columns in the order of their fields."""
    cdef Column batch, entry
    cdef int field
    memset(&batch, 0, sizeof(batch))
    memset(&entry, 0, sizeof(entry))
    try:
        for field in range(FIELDS):
            if not columns[field].size:
                continue
            if PACKED[field]:
                put_part(&batch, field, columns[field].start, columns[field].size)
            else:
                memcpy(more(&batch, columns[field].size), columns[field].start, columns[field].size)
        put_part(&entry, ENTRY, batch.start, batch.size)
        return PyBytes_FromStringAndSize(entry.start, entry.size)
    finally:
        free(batch.start)
        free(entry.start)


def write_entry(bytes shared, list rows, parts):
    """See packets.py."""
    cdef Column[FIELDS] columns
    cdef _Tables tables = _Tables(parts)
    cdef Py_ssize_t place = 0
    cdef int field
    memset(columns, 0, sizeof(columns))
    try:
        put_bytes(columns, SHARED, shared)
        for row in rows:
            if type(row) is tuple:
                add(columns, tables, place, <tuple> row)
                place += 1
            else:
                add_block(columns, tables, place, row)
                place += len(row)
        if tables.vectors:
            put_text(columns, FEATURE_SET, _SET_ID)
        if any([type(row) is tuple and row[2].idempotency_key for row in rows]):
            for row in rows:
                if type(row) is tuple:
                    put_text(columns, IDEMPOTENCY_KEY, row[2].idempotency_key)
                else:
                    for _ in range(len(row)):
                        put_text(columns, IDEMPOTENCY_KEY, "")
        return joined(columns)
    finally:
        for field in range(FIELDS):
            free(columns[field].start)
