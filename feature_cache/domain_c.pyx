# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The compiled twin of what domain.py does with each row, which says what that is."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE

cdef enum:
    MOST = 512  # features of a set
    MOST_WORDS = 8  # of 64 bits


cdef class Seen:
    """The tables of a `Domain`, and what is looked up in them."""

    cdef const Py_ssize_t[::1] columns
    cdef const double[::1] low, high, first, stretch, values, slopes, scores, most_turned
    cdef const double[:, ::1] whitening
    cdef const unsigned long long[:, ::1] patterns
    cdef const long long[::1] most_same
    cdef const unsigned char[::1] is_watched
    cdef double most_distance
    cdef Py_ssize_t count, last, watched, words, row_bytes

    def __init__(self, domain):
        self.columns, self.low, self.high = domain.columns, domain.low, domain.high
        self.first, self.stretch = domain.first, domain.stretch
        self.values, self.slopes, self.scores = domain.table
        self.whitening, self.patterns, self.most_distance = domain.whitening, domain.patterns, domain.most_distance
        self.most_same, self.most_turned = domain.most_same, domain.most_turned
        self.is_watched, self.watched = domain.is_watched.view("u1"), domain.is_watched.sum()
        self.count, self.last = len(self.columns), len(self.values) - 1
        self.words, self.row_bytes = (self.count + 63) // 64, domain.feature_set.row_bytes
        if self.count > MOST:
            raise ValueError(f"{self.count} features are more than there is room for")

    def outside(self, list rows):
        """See domain.py."""
        cdef object row, before = None  # `bytes` would refuse `SetRow`
        cdef bint is_outside = False
        cdef list found = []
        for row in rows:
            if row is not before:  # orders that ask the same have the same row
                before, is_outside = row, self.is_outside(row)
            found.append(is_outside)
        return found

    cdef const float* floats(self, row) except NULL:
        if not isinstance(row, bytes) or PyBytes_GET_SIZE(row) != self.row_bytes:
            raise ValueError(f"{len(row)} bytes are no row")
        return <const float*> PyBytes_AS_STRING(row)

    cdef double score(self, Py_ssize_t j, double value) noexcept:
        """The normal score of a feature's value."""
        cdef Py_ssize_t low = 0, high = self.last, middle
        cdef double within = (value - self.first[j]) * self.stretch[j]
        if within < 0.0:
            within = 0.0
        elif within > 1.0:
            within = 1.0
        within += 2.0 * j
        while low < high:  # the last value that is not above it, but the very last one
            middle = (low + high + 1) // 2
            if self.values[middle] <= within:
                low = middle
            else:
                high = middle - 1
        if low == self.last:
            return self.scores[low]
        return self.slopes[low] * (within - self.values[low]) + self.scores[low]

    cdef bint is_outside(self, row) except -1:
        cdef const float* floats = self.floats(row)
        cdef double[MOST] whitened
        cdef double value, score, distance = 0.0
        cdef unsigned long long[MOST_WORDS] pattern
        cdef Py_ssize_t j, k
        for j in range(self.words):
            pattern[j] = 0
        for j in range(self.count):
            whitened[j] = 0.0
        for j in range(self.count):
            value = floats[self.columns[j]]
            if value != value:  # undefined
                pattern[j // 64] |= <unsigned long long> 1 << (j % 64)
                score = 0.0
            elif value < self.low[j] or value > self.high[j]:
                return True
            else:
                score = self.score(j, value)
            for k in range(self.count):
                whitened[k] += score * self.whitening[j, k]
        for k in range(self.count):
            distance += whitened[k] * whitened[k]
        return distance > self.most_distance or not self.is_known(pattern)

    cdef bint is_known(self, unsigned long long* pattern) noexcept:
        cdef Py_ssize_t at, word
        for at in range(self.patterns.shape[0]):
            for word in range(self.words):
                if self.patterns[at, word] != pattern[word]:
                    break
            else:
                return True
        return False

    def see(
        self,
        values,
        double[::1] before,
        long long[::1] same,
        double[::1] turned,
        const unsigned char[::1] is_signed,
        const double[:, ::1] others,
    ):
        """Takes a vector into a `Watch`; whether it is implausible then."""
        cdef const float[:] floats = values
        cdef double[MOST] scores
        cdef unsigned char[MOST] is_same
        cdef double value, leaning
        cdef Py_ssize_t j, k, unchanged = 0
        for j in range(self.count):
            value = floats[self.columns[j]]
            scores[j] = self.score(j, value) if value == value and self.is_watched[j] else 0.0
            is_same[j] = value == before[j] and self.is_watched[j]
            unchanged += is_same[j]
            before[j] = value
        for j in range(self.count):
            if not is_same[j]:
                same[j] = 0
            elif 2 * unchanged <= self.watched:
                same[j] += 1
        if 2 * unchanged <= self.watched:
            for j in range(self.count):
                if not is_signed[j]:
                    continue
                leaning = 0.0
                for k in range(self.count):
                    leaning += others[j, k] * scores[k]
                turned[j] = clipped(turned[j] + 2 * scores[j] * leaning, 2 * self.most_turned[j])
        for j in range(self.count):
            if same[j] > self.most_same[j] or turned[j] > self.most_turned[j]:
                return True
        return False


cdef double clipped(double value, double most) noexcept:
    if value < 0.0:
        return 0.0
    return most if value > most else value
