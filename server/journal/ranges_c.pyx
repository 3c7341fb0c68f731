# cython: language_level=3
"""The compiled twin of `ranges.scan_plainly`, which says what it does; it reads entries where they stand.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcmp

from pretrade.audit.v1 import packet_pb2

cdef enum:
    PREFIXED = 2

_ENTRY = packet_pb2.JournalEntry.DESCRIPTOR.fields_by_name
_BATCH = packet_pb2.DecisionBatch.DESCRIPTOR.fields_by_name

cdef unsigned long long DECISION = _ENTRY["decision"].number
cdef unsigned long long DECISIONS = _ENTRY["decisions"].number
cdef unsigned long long ORDERS = _BATCH["orders"].number
cdef unsigned long long ANSWERS = _BATCH["answers"].number
cdef unsigned long long DECISION_ID = _BATCH["decision_id"].number
cdef unsigned long long IDEMPOTENCY_KEY = _BATCH["idempotency_key"].number


cdef struct Span:
    # Bytes that are still to be read; `at` is NULL once they are not what this module reads.
    const unsigned char* at
    const unsigned char* end


cdef unsigned long long varint(Span* of) noexcept:
    """An integer of up to 63 bits; what is longer is not read."""
    cdef unsigned long long number = 0
    cdef int shift = 0
    cdef unsigned char byte
    while of.at < of.end and shift < 63:
        byte = of.at[0]
        of.at += 1
        number |= <unsigned long long> (byte & 0x7F) << shift
        if byte < 0x80:
            return number
        shift += 7
    of.at = NULL
    return 0


cdef Span field(Span* of, unsigned long long* number) noexcept:
    """The content of the next field and its number; only of fields that stand behind their length."""
    cdef Span content
    cdef unsigned long long size = 0, tag = varint(of)
    content.at = content.end = NULL
    if of.at != NULL and tag & 7 == PREFIXED:
        size = varint(of)
    else:
        of.at = NULL
    if of.at == NULL or size > <unsigned long long> (of.end - of.at):
        of.at = NULL
        return content
    number[0] = tag >> 3
    content.at = of.at
    content.end = of.at + size
    of.at = content.end
    return content


cdef bint is_less(Span one, Span other) noexcept:
    cdef Py_ssize_t size = one.end - one.at, other_size = other.end - other.at
    cdef int order = memcmp(one.at, other.at, min(size, other_size))
    return order < 0 or (order == 0 and size < other_size)


cdef bytes copied(Span of):
    return PyBytes_FromStringAndSize(<const char*> of.at, of.end - of.at) if of.at != NULL else b""


def scan(bytes entry, set orders, set answers):
    """As `ranges.scan_plainly`; None for an entry that is to be read as a message."""
    cdef Span whole, batch, content, least, greatest
    cdef unsigned long long number = 0
    cdef bint has_keys = False
    whole.at = <const unsigned char*> PyBytes_AS_STRING(entry)
    whole.end = whole.at + PyBytes_GET_SIZE(entry)
    batch.at = batch.end = least.at = least.end = greatest.at = greatest.end = NULL
    while whole.at < whole.end:
        content = field(&whole, &number)
        if whole.at == NULL or number == DECISION or (number == DECISIONS and batch.at != NULL):
            return None
        if number == DECISIONS:
            batch = content
    while batch.at < batch.end:
        content = field(&batch, &number)
        if batch.at == NULL:
            return None
        if number == ORDERS:
            orders.add(copied(content))
        elif number == ANSWERS:
            answers.add(copied(content))
        elif number == DECISION_ID:
            if least.at == NULL or is_less(content, least):
                least = content
            if greatest.at == NULL or is_less(greatest, content):
                greatest = content
        elif number == IDEMPOTENCY_KEY and content.at < content.end:
            has_keys = True
    return copied(least), copied(greatest), has_keys
