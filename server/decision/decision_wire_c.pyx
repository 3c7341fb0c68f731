# cython: language_level=3
"""The compiled twin of decision_wire.py, which says what it does.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcpy

from google.protobuf.timestamp_pb2 import Timestamp

from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.protowire import short_tag

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL

cdef enum:
    INTEGER = 0
    EIGHT_BYTES = 1
    PREFIXED = 2
    FIXED_ROOM = 256  # more than everything takes whose length does not vary
    USE_ROOM = 48  # more than a use takes, and below 0x80

_OF_DECISION, _OF_BUDGET, _OF_USE = pb.Decision.DESCRIPTOR, pb.Budget.DESCRIPTOR, pb.StageUse.DESCRIPTOR
cdef char ID = short_tag(_OF_DECISION, "decision_id", PREFIXED)
cdef char ORDER_REF = short_tag(_OF_DECISION, "order_ref", PREFIXED)
cdef char ACTION = short_tag(_OF_DECISION, "action", INTEGER)
cdef char SCORE = short_tag(_OF_DECISION, "score", EIGHT_BYTES)
cdef char THRESHOLD = short_tag(_OF_DECISION, "threshold", EIGHT_BYTES)
cdef char SOURCE = short_tag(_OF_DECISION, "source", INTEGER)
cdef char REASONS = short_tag(_OF_DECISION, "reasons", PREFIXED)
cdef char DEGRADATIONS = short_tag(_OF_DECISION, "degradations", PREFIXED)
cdef char MODEL_NAME = short_tag(_OF_DECISION, "model_name", PREFIXED)
cdef char MODEL_VERSION = short_tag(_OF_DECISION, "model_version", PREFIXED)
cdef char FEATURE_AGE = short_tag(_OF_DECISION, "feature_age", PREFIXED)
cdef char BUDGET = short_tag(_OF_DECISION, "budget", PREFIXED)
cdef char DECIDED_AT = short_tag(_OF_DECISION, "decided_at", PREFIXED)
cdef char CONTROL_VERSION = short_tag(_OF_DECISION, "control_version", INTEGER)
cdef char ALLOWED = short_tag(_OF_BUDGET, "allowed_us", INTEGER)
cdef char USED = short_tag(_OF_BUDGET, "used_us", INTEGER)
cdef char STAGES = short_tag(_OF_BUDGET, "stages", PREFIXED)
cdef char STAGE = short_tag(_OF_USE, "stage", INTEGER)
cdef char STAGE_ALLOWED = short_tag(_OF_USE, "allowed_us", INTEGER)
cdef char STAGE_USED = short_tag(_OF_USE, "used_us", INTEGER)
cdef char SKIPPED = short_tag(_OF_USE, "skipped", INTEGER)
cdef char RESULTS = short_tag(pb.DecideBatchResponse.DESCRIPTOR, "results", PREFIXED)
cdef char OF_ORDER = short_tag(pb.OrderResult.DESCRIPTOR, "order_ref", PREFIXED)
cdef char DECISION = short_tag(pb.OrderResult.DESCRIPTOR, "decision", PREFIXED)
cdef char SECONDS = short_tag(Timestamp.DESCRIPTOR, "seconds", INTEGER)  # a `Duration` has the same fields
cdef char NANOS = short_tag(Timestamp.DESCRIPTOR, "nanos", INTEGER)


cdef char* varint(char* to, unsigned long long number) noexcept:
    while number >= 0x80:
        to[0] = <char> (number & 0x7F | 0x80)
        number >>= 7
        to += 1
    to[0] = <char> number
    return to + 1


cdef char* integer(char* to, char tag, long long number) noexcept:
    """None when it is 0, as everywhere in Protocol Buffers."""
    if number == 0:
        return to
    to[0] = tag
    return varint(to + 1, <unsigned long long> number)


cdef char* eight_bytes(char* to, char tag, double number) noexcept:
    to[0] = tag
    memcpy(to + 1, &number, 8)  # little-endian, as every machine that this is compiled for
    return to + 9


cdef char* prefixed(char* to, char tag, const char* content, Py_ssize_t size) noexcept:
    if size == 0:
        return to
    to[0] = tag
    to = varint(to + 1, size)
    memcpy(to, content, size)
    return to + size


cdef char* enums(char* to, char tag, list values) except NULL:
    """Packed; each is below 0x80, a test holds that."""
    cdef Py_ssize_t place, size = len(values)
    if size == 0:
        return to
    to[0] = tag
    to = varint(to + 1, size)
    for place in range(size):
        to[place] = <char> <int> values[place]
    return to + size


cdef char* instant(char* to, char tag, long long nanoseconds) noexcept:
    """A `Timestamp`, or a `Duration`, whose two fields have one sign."""
    cdef long long sign = -1 if nanoseconds < 0 else 1
    cdef unsigned long long size = <unsigned long long> (nanoseconds * sign)
    cdef char* start = to + 2
    to[0] = tag
    to = integer(start, SECONDS, sign * <long long> (size // 1_000_000_000))
    to = integer(to, NANOS, sign * <long long> (size % 1_000_000_000))
    start[-1] = <char> (to - start)
    return to


cdef long long microseconds(double seconds) noexcept:
    return <long long> (seconds * 1e6) if seconds > 0 else 0


cdef char* use(char* to, tuple one) except NULL:
    cdef char* start = to + 2
    to[0] = STAGES
    to = integer(start, STAGE, <int> one[0])
    to = integer(to, STAGE_ALLOWED, microseconds(<double> one[1]))
    to = integer(to, STAGE_USED, microseconds(<double> one[2]))
    to = integer(to, SKIPPED, <int> one[3])
    start[-1] = <char> (to - start)
    return to


cdef bytes decision(
    str decision_id,
    str order_ref,
    int action,
    list reasons,
    list degradations,
    int source,
    str model_name,
    str model_version,
    double score,
    double threshold,
    double feature_age_seconds,
    long long decided_at_ns,
    unsigned long long control_version,
    long long allowed_us,
    long long used_us,
    tuple first,
    list uses,
):
    """See `write` in decision_wire.py; `first` stands for the first of the uses, unless it is None."""
    cdef Py_ssize_t id_size, ref_size, name_size, version_size, count = len(uses), place
    cdef const char* id_text = PyUnicode_AsUTF8AndSize(decision_id, &id_size)
    cdef const char* ref_text = PyUnicode_AsUTF8AndSize(order_ref, &ref_size)
    cdef const char* name_text = PyUnicode_AsUTF8AndSize(model_name, &name_size)
    cdef const char* version_text = PyUnicode_AsUTF8AndSize(model_version, &version_size)
    cdef Py_ssize_t room = FIXED_ROOM + id_size + ref_size + name_size + version_size
    room += len(reasons) + len(degradations) + USE_ROOM * count
    cdef bytes scratch = PyBytes_FromStringAndSize(NULL, 2 * room)
    cdef char* begin = PyBytes_AS_STRING(scratch)
    cdef char* to = begin
    cdef char* ledger = begin + room
    cdef char* end

    to = prefixed(to, ID, id_text, id_size)
    to = prefixed(to, ORDER_REF, ref_text, ref_size)
    to = integer(to, ACTION, action)
    if score == score:  # not NaN
        to = eight_bytes(to, SCORE, score)
        to = eight_bytes(to, THRESHOLD, threshold)
    to = integer(to, SOURCE, source)
    to = enums(to, REASONS, reasons)
    to = enums(to, DEGRADATIONS, degradations)
    to = prefixed(to, MODEL_NAME, name_text, name_size)
    to = prefixed(to, MODEL_VERSION, version_text, version_size)
    if feature_age_seconds == feature_age_seconds:
        to = instant(to, FEATURE_AGE, <long long> (feature_age_seconds * 1e9))
    end = integer(ledger, ALLOWED, allowed_us)
    end = integer(end, USED, used_us)
    for place in range(count):
        end = use(end, first if place == 0 and first is not None else <tuple?> uses[place])
    to[0] = BUDGET  # there even if all is 0
    to = varint(to + 1, end - ledger)
    memcpy(to, ledger, end - ledger)
    to += end - ledger
    to = instant(to, DECIDED_AT, decided_at_ns)
    to = integer(to, CONTROL_VERSION, <long long> control_version)
    return PyBytes_FromStringAndSize(begin, to - begin)


def write(
    str decision_id,
    str order_ref,
    int action,
    list reasons,
    list degradations,
    int source,
    str model_name,
    str model_version,
    double score,
    double threshold,
    double feature_age_seconds,
    long long decided_at_ns,
    unsigned long long control_version,
    long long allowed_us,
    long long used_us,
    list uses,
):
    """See decision_wire.py."""
    return decision(
        decision_id, order_ref, action, reasons, degradations, source, model_name, model_version, score, threshold,
        feature_age_seconds, decided_at_ns, control_version, allowed_us, used_us, None, uses,
    )


cdef long long between(double since, double until) noexcept:
    """`microseconds` of decided_block.py."""
    return <long long> ((until - since) * 1e6) if until > since else 0


def write_block(decided):
    """What `DecidedBlock.wire` writes, of each decision of a block."""
    block, budget = decided.block, decided.block.budget
    cdef list ids = decided.ids, actions = block.actions, reasons = block.reasons, degradations = block.degradations
    cdef list own = None if block.own is None else list(block.own), objections = block.objections
    cdef list uses = budget.uses, found = [], why
    cdef tuple first = None
    cdef int source = block.source
    cdef str name = block.model.name, version = block.model.version
    cdef list scores = block.scores
    cdef double threshold = block.model.threshold
    cdef double arrived = budget.arrived, deadline = budget.deadline, ended_at = decided.ended_at
    cdef long long wall_ns = decided.wall_ns
    cdef unsigned long long control_version = decided.control_version
    cdef Py_ssize_t place = 0
    for order, view in zip(block.orders, block.views, strict=True):
        if own is not None:
            arrived, deadline, first = own[place]
        why = [reasons[place]]
        if objections:
            why += objections[place]
        found.append(
            decision(
                ids[place], order.order_ref, actions[place], why, degradations, source, name, version, scores[place],
                threshold, view.age_seconds, wall_ns, control_version, between(arrived, deadline),
                between(arrived, ended_at), first, uses,
            )
        )
        place += 1
    return found


def write_stages(list uses):
    """See decision_wire.py."""
    cdef Py_ssize_t count = len(uses), place
    cdef bytes scratch = PyBytes_FromStringAndSize(NULL, USE_ROOM * count + 1)
    cdef char* begin = PyBytes_AS_STRING(scratch)
    cdef char* to = begin
    for place in range(count):
        to = use(to, <tuple?> uses[place])
    return PyBytes_FromStringAndSize(begin, to - begin)


cdef Py_ssize_t prefixed_size(Py_ssize_t size) noexcept:
    """Of a part with its tag and its length."""
    cdef Py_ssize_t left = size, whole = 2 + size
    while left >= 0x80:
        left >>= 7
        whole += 1
    return whole


cdef char* part(char* to, char tag, const char* content, Py_ssize_t size) noexcept:
    """Also when it is empty, unlike `prefixed`."""
    to[0] = tag
    to = varint(to + 1, size)
    memcpy(to, content, size)
    return to + size


def write_results(list order_refs, list decisions):
    """See decision_wire.py."""
    cdef Py_ssize_t count = len(order_refs), place, whole = 0, size, ref_size
    cdef const char* ref_text
    cdef bytes decision, found
    cdef char* to
    if len(decisions) != count:
        raise ValueError(f"{count} orders and {len(decisions)} decisions")
    for place in range(count):
        decision = decisions[place]
        if decision is None:
            raise TypeError("a decision is missing")
        PyUnicode_AsUTF8AndSize(order_refs[place], &ref_size)
        whole += prefixed_size(prefixed_size(ref_size) + prefixed_size(PyBytes_GET_SIZE(decision)))
    found = PyBytes_FromStringAndSize(NULL, whole)
    to = PyBytes_AS_STRING(found)
    for place in range(count):
        decision = decisions[place]
        ref_text = PyUnicode_AsUTF8AndSize(order_refs[place], &ref_size)
        size = PyBytes_GET_SIZE(decision)
        to[0] = RESULTS
        to = varint(to + 1, prefixed_size(ref_size) + prefixed_size(size))
        to = part(to, OF_ORDER, ref_text, ref_size)
        to = part(to, DECISION, PyBytes_AS_STRING(decision), size)
    return found
