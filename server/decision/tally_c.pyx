# cython: language_level=3
"""The compiled twin of tally.py, which says what it does."""

from libc.string cimport memset

from pretrade.decision.v1 import decision_pb2 as pb
from server.timing.histogram import LATENCY_EDGES_SECONDS

cdef enum:
    STAGES = 16  # more than there are, as is said of the buckets
    BUCKETS = 16

assert max(pb.Stage.values()) < STAGES, "a stage beyond the table"
assert len(LATENCY_EDGES_SECONDS) < BUCKETS, "a bucket beyond the table"

cdef double[BUCKETS] EDGES
cdef int LAST = len(LATENCY_EDGES_SECONDS)
cdef int at
for at in range(LAST):
    EDGES[at] = LATENCY_EDGES_SECONDS[at]


cdef struct Observed:
    long long counts[BUCKETS]
    double total
    bint any


cdef void observe(Observed* of, double value, long long times) noexcept:
    """As `Histogram.observe`: a value at an edge counts below it."""
    cdef int bucket = 0
    while bucket < LAST and EDGES[bucket] < value:
        bucket += 1
    of.counts[bucket] += times
    of.total += value * times
    of.any = True


cdef add(Observed* of, histogram):
    cdef int bucket
    if of.any:
        histogram.add([of.counts[bucket] for bucket in range(LAST + 1)], of.total)


def count(list ledgers, used_seconds, allowed_seconds, skips, long long times=1):
    """See tally.py."""
    cdef Observed used[STAGES]
    cdef Observed allowed[STAGES]
    cdef list uses
    cdef tuple one
    cdef int stage, skipped
    memset(used, 0, sizeof(used))
    memset(allowed, 0, sizeof(allowed))
    for uses in ledgers:
        for one in uses:
            stage = one[0]
            skipped = one[3]
            if not 0 <= stage < STAGES:
                raise KeyError(stage)
            if skipped:
                skips[stage, skipped] += times
            else:
                observe(&used[stage], <double> one[2], times)
                observe(&allowed[stage], <double> one[1], times)
    for stage in range(STAGES):
        if used[stage].any:
            add(&used[stage], used_seconds[stage])
            add(&allowed[stage], allowed_seconds[stage])
