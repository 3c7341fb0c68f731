# cython: language_level=3
"""Reads plain orders: what nearly every call brings. Anything else is for `OrderReader`, the only maker of errors.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.math cimport INFINITY, NAN
from libc.string cimport memcpy

from google.protobuf.duration_pb2 import Duration

from fallback.order import Order
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.protowire import short_tag

cdef extern from "Python.h":
    object PyUnicode_DecodeUTF8(const char* text, Py_ssize_t size, const char* errors)

cdef enum:
    INTEGER = 0
    EIGHT_BYTES = 1
    PREFIXED = 2
    LONGEST = 64  # characters of a name
    MOST_NANOS = 999_999_999

cdef unsigned long long MOST_SECONDS = 315_576_000_000  # of a `Duration`; see convert.py

_OF_ORDER = pb.Order.DESCRIPTOR
cdef unsigned char ORDER = short_tag(pb.DecideRequest.DESCRIPTOR, "order", PREFIXED)
cdef unsigned char EXPLAIN = short_tag(pb.DecideRequest.DESCRIPTOR, "explain", INTEGER)
cdef unsigned char ORDERS = short_tag(pb.DecideBatchRequest.DESCRIPTOR, "orders", PREFIXED)
cdef unsigned char ORDER_REF = short_tag(_OF_ORDER, "order_ref", PREFIXED)
cdef unsigned char INSTRUMENT = short_tag(_OF_ORDER, "instrument", PREFIXED)
cdef unsigned char SIDE = short_tag(_OF_ORDER, "side", INTEGER)
cdef unsigned char QUANTITY = short_tag(_OF_ORDER, "quantity", EIGHT_BYTES)
cdef unsigned char LIMIT_PRICE = short_tag(_OF_ORDER, "limit_price", EIGHT_BYTES)
cdef unsigned char STRATEGY = short_tag(_OF_ORDER, "strategy", PREFIXED)
cdef unsigned char REDUCE_ONLY = short_tag(_OF_ORDER, "reduce_only", INTEGER)
cdef unsigned char TIMEOUT = short_tag(_OF_ORDER, "timeout", PREFIXED)
cdef unsigned char SECONDS = short_tag(Duration.DESCRIPTOR, "seconds", INTEGER)
cdef unsigned char NANOS = short_tag(Duration.DESCRIPTOR, "nanos", INTEGER)
assert ORDER == short_tag(pb.DecideStreamRequest.DESCRIPTOR, "order", PREFIXED), "a stream's request is read otherwise"
cdef unsigned long long BUY = pb.SIDE_BUY
cdef unsigned long long SELL = pb.SIDE_SELL


cdef struct Span:
    # Bytes that are still to be read; `at` is NULL once they are not what this module reads.
    const unsigned char* at
    const unsigned char* end


cdef unsigned long long varint(Span* of) noexcept:
    """An integer of up to 63 bits; what is longer is not read."""
    cdef unsigned long long number = 0
    cdef int shift = 0
    cdef unsigned char byte
    while of.at != NULL and of.at < of.end and shift < 63:
        byte = of.at[0]
        of.at += 1
        number |= <unsigned long long> (byte & 0x7F) << shift
        if byte < 0x80:
            return number
        shift += 7
    of.at = NULL
    return 0


cdef double eight_bytes(Span* of) noexcept:
    cdef double number = 0
    if of.at == NULL or of.end - of.at < 8:
        of.at = NULL
        return 0
    memcpy(&number, of.at, 8)  # little-endian, as every machine that this is compiled for
    of.at += 8
    return number


cdef Span prefixed(Span* of) noexcept:
    cdef Span content
    cdef unsigned long long size = varint(of)
    if of.at == NULL or size > <unsigned long long> (of.end - of.at):
        of.at = NULL
        content.at = content.end = NULL
        return content
    content.at = of.at
    content.end = of.at + size
    of.at = content.end
    return content


cdef double timeout_of(Span content) noexcept:
    """A `Duration` in seconds; not above 0 when it is none that an order may have."""
    cdef unsigned long long seconds = 0, nanos = 0
    cdef unsigned char tag
    cdef int seen = 0, bit
    while content.at != NULL and content.at < content.end:
        tag = content.at[0]
        content.at += 1
        bit = 1 if tag == SECONDS else 2 if tag == NANOS else 0
        if bit == 0 or seen & bit:
            return 0
        seen |= bit
        if bit == 1:
            seconds = varint(&content)
        else:
            nanos = varint(&content)
    if content.at == NULL or nanos > MOST_NANOS or seconds > MOST_SECONDS:
        return 0
    return <double> seconds + <double> nanos / 1e9


cdef object text(Span content):
    return PyUnicode_DecodeUTF8(<const char*> content.at, content.end - content.at, NULL)


cdef object order_of(Span wire, dict instruments):
    """The order, or None."""
    cdef Span ref, instrument, strategy, rest = wire
    cdef unsigned long long side = 0, reduce_only = 0
    cdef double quantity = 0, limit_price = NAN, seconds = 0
    cdef unsigned char tag
    cdef int seen = 0, bit
    ref.at = ref.end = instrument.at = instrument.end = strategy.at = strategy.end = wire.end
    while rest.at != NULL and rest.at < rest.end:
        tag = rest.at[0]
        rest.at += 1
        if tag == ORDER_REF:
            bit = 1
            ref = prefixed(&rest)
        elif tag == INSTRUMENT:
            bit = 2
            instrument = prefixed(&rest)
        elif tag == SIDE:
            bit = 4
            side = varint(&rest)
        elif tag == QUANTITY:
            bit = 8
            quantity = eight_bytes(&rest)
        elif tag == LIMIT_PRICE:
            bit = 16
            limit_price = eight_bytes(&rest)
            if not 0 < limit_price < INFINITY:
                return None
        elif tag == STRATEGY:
            bit = 32
            strategy = prefixed(&rest)
        elif tag == REDUCE_ONLY:
            bit = 64
            reduce_only = varint(&rest)
        elif tag == TIMEOUT:
            bit = 128
            seconds = timeout_of(prefixed(&rest))
            if not seconds > 0:
                return None
        else:
            return None
        if seen & bit:
            return None
        seen |= bit
    if rest.at == NULL or not (0 < quantity < INFINITY) or (side != BUY and side != SELL):
        return None
    name = instruments.get(PyBytes_FromStringAndSize(<const char*> instrument.at, instrument.end - instrument.at))
    if name is None:
        return None
    try:
        order_ref, strategy_name = text(ref), text(strategy)
    except UnicodeDecodeError:
        return None
    if len(order_ref) > LONGEST or not 0 < len(strategy_name) <= LONGEST:
        return None
    return Order(
        PyBytes_FromStringAndSize(<const char*> wire.at, wire.end - wire.at),
        name,
        side,
        quantity,
        limit_price,
        strategy_name,
        reduce_only != 0,
        None,
        order_ref,
        "",
        seconds if seen & 128 else None,
    )


def read_request(bytes request not None, dict instruments not None):
    """The order of a `DecideRequest`, if it is plain; else None.

    It is plain if it meets every rule, comes with nothing but itself, and has neither features of the caller's nor an
    idempotency key.

    Args:
        request: Serialised.
        instruments: The configured ones: by their names as bytes, their names.
    """
    cdef Span rest, order
    cdef unsigned char tag
    rest.at = <const unsigned char*> PyBytes_AS_STRING(request)
    rest.end = rest.at + PyBytes_GET_SIZE(request)
    order.at = NULL
    while rest.at != NULL and rest.at < rest.end:
        tag = rest.at[0]
        rest.at += 1
        if tag == ORDER and order.at == NULL:
            order = prefixed(&rest)
        elif tag != EXPLAIN or varint(&rest) != 0:
            return None
    if rest.at == NULL or order.at == NULL:
        return None
    return order_of(order, instruments)


def read_batch(bytes request not None, dict instruments not None):
    """The orders of a `DecideBatchRequest`, each as from `read_request`; None if there is anything but orders in it.

    In the place of an order that is not plain stands its own serialised message.

    Args:
        request: Serialised.
        instruments: As of `read_request`.
    """
    cdef Span rest, one
    cdef list orders = []
    rest.at = <const unsigned char*> PyBytes_AS_STRING(request)
    rest.end = rest.at + PyBytes_GET_SIZE(request)
    while rest.at < rest.end:
        if rest.at[0] != ORDERS:
            return None
        rest.at += 1
        one = prefixed(&rest)
        if rest.at == NULL:
            return None
        order = order_of(one, instruments)
        if order is None:
            order = PyBytes_FromStringAndSize(<const char*> one.at, one.end - one.at)
        orders.append(order)
    return orders
