# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The compiled twin of how a `FeatureCache` takes vectors, of those that are plain; l1.py takes all others.

Where the fields of a vector are, codec.py says.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t
from libc.string cimport memcmp, memcpy

from feature_cache.store.codec import BookState
from feature_cache.store.vectors import key_of

cdef enum:
    PREFIX_BYTES = 8
    SEQUENCE = 8
    PUBLISH_TIME = 40
    TRANSIT = 48
    STATE = 72
    LENGTH = 73
    HEADER_BYTES = 74

cdef int64_t LARGE_NS = <int64_t> 1 << 61  # no sum or difference of three smaller times overflows


cdef class Plain:
    """Takes vectors that become the newest of their instruments, as almost all do.

    Args:
        cache: Whose vectors they become.
        new: Makes its entries.
    """

    cdef object cache, new
    cdef dict entries, instruments
    cdef bytes prefix
    cdef Py_ssize_t values_bytes
    cdef unsigned char states
    cdef int64_t max_lead_ns
    cdef double ttl_seconds

    def __init__(self, cache, new):
        self.cache, self.entries, self.new = cache, cache._entries, new
        feature_set = cache.feature_set
        self.instruments = {
            key_of(name, feature_set.id).encode(): (name.encode(), name) for name in cache.instruments
        }
        self.prefix, self.values_bytes = cache.heads.prefix, feature_set.row_bytes
        self.states = max(BookState) + 1  # they are numbered from 0
        self.max_lead_ns, self.ttl_seconds = cache._max_lead_ns, cache._ttl_seconds

    def others(self, messages, int64_t now_ns, now):
        """Takes what is plain, and gives the messages that are not, in their sequence."""
        cdef Py_ssize_t taken = 0
        try:
            for message in messages:
                if isinstance(message, list) and self.is_taken(<list> message, now_ns, now):
                    taken += 1
                else:
                    yield message
        finally:
            self.cache.updates += taken

    cdef bint is_taken(self, list message, int64_t now_ns, now) except -1:
        cdef const char* at
        cdef Py_ssize_t length
        cdef int64_t sequence, publish_time, transit
        cdef double age
        if len(message) != 3 or type(message[2]) is not bytes:
            return False
        instrument = self.instruments.get(message[1])
        if instrument is None or (message[0] != b"message" and message[0] != b"smessage"):
            return False
        at, length = PyBytes_AS_STRING(message[2]), PyBytes_GET_SIZE(message[2]) - HEADER_BYTES - self.values_bytes
        name = (<tuple> instrument)[0]
        if length != PyBytes_GET_SIZE(name) or length != <unsigned char> at[LENGTH]:
            return False
        if memcmp(at, PyBytes_AS_STRING(self.prefix), PREFIX_BYTES) or <unsigned char> at[STATE] >= self.states:
            return False
        if memcmp(at + HEADER_BYTES, PyBytes_AS_STRING(name), length):
            return False
        memcpy(&sequence, at + SEQUENCE, sizeof(sequence))
        memcpy(&publish_time, at + PUBLISH_TIME, sizeof(publish_time))
        memcpy(&transit, at + TRANSIT, sizeof(transit))
        if not (0 <= publish_time < LARGE_NS and 0 <= transit < LARGE_NS and 0 <= now_ns < LARGE_NS):
            return False
        if publish_time - now_ns > self.max_lead_ns:
            return False
        age = max(0, now_ns - publish_time + transit) / 1e9
        if age > self.ttl_seconds:
            return False
        current = self.entries[(<tuple> instrument)[1]]
        if current is not None and sequence <= <int64_t> current.sequence:
            return False
        self.entries[(<tuple> instrument)[1]] = self.new(message[2], sequence, age, now)
        return True
