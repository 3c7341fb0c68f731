# cython: language_level=3
"""Reads plain entries of decisions where they stand, and writes their rows as COPY data; see decision_rows.py.

Source: https://protobuf.dev/programming-guides/encoding/ and https://www.postgresql.org/docs/current/sql-copy.html.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from pretrade.audit.v1 import packet_pb2
from server.journal.entries import NO_AGE

cdef enum:
    FIELDS = 64  # more than there are
    INTEGER = 0
    EIGHT_BYTES = 1
    PREFIXED = 2
    FOUR_BYTES = 5
    NUMBER_COLUMNS = 9
    TEXT_COLUMNS = 3
    TEXT_ROOM = 4  # the length of a field
    NUMBER_ROOM = 12  # a length and eight bytes

_BATCH = packet_pb2.DecisionBatch.DESCRIPTOR
_NUMBER = {field.name: field.number for field in _BATCH.fields}
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
cdef int AGE_US = _NUMBER["age_us"]
cdef int ATTEMPT_COUNT = _NUMBER["attempt_count"]
cdef int ATTEMPT = _NUMBER["attempt"]
cdef int ATTEMPT_USED = _NUMBER["attempt_used_us"]
cdef int ATTEMPT_INDEX = _NUMBER["attempt_batch_index"]
cdef int PART_SCORE = _NUMBER["part_score"]
cdef int REST_ROW = _NUMBER["rest_row"]
cdef int REST = _NUMBER["rest"]
_TEXTS = ("decision_id", "order_ref", "idempotency_key", "feature_set_id")
_EIGHT = (
    *("quantity", "limit_price", "score", "feature_age_ns", "decided_at_ns", "age_seconds", "arrived_monotonic_ns"),
    *("decided_monotonic_ns", "mid_price"),
)

cdef bint[FIELDS] KNOWN, PACKED, TEXT, EIGHT
cdef int at
memset(KNOWN, 0, sizeof(KNOWN))
memset(PACKED, 0, sizeof(PACKED))
memset(TEXT, 0, sizeof(TEXT))
memset(EIGHT, 0, sizeof(EIGHT))
for field in _BATCH.fields:
    at = field.number
    KNOWN[at], PACKED[at], TEXT[at], EIGHT[at] = True, field.is_packed, field.name in _TEXTS, field.name in _EIGHT

cdef long long WITHOUT_AGE = NO_AGE
cdef long long POSTGRES_EPOCH_US = 946_684_800_000_000
cdef unsigned long long MOST_SMALL = 0xFFFF_FFFF


cdef struct Span:
    # Bytes that are still to be read; `at` is NULL once they are not what this module reads.
    const unsigned char* at
    const unsigned char* end


cdef struct Small:
    # What there is in a column of integers of 32 bits.
    Py_ssize_t count
    unsigned long long highest
    unsigned long long total


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


cdef bint is_text(Span content) noexcept:
    """Whether it is ASCII without NUL: what PostgreSQL stores as it stands."""
    while content.at < content.end:
        if content.at[0] == 0 or content.at[0] >= 0x80:
            return False
        content.at += 1
    return True


cdef bint is_message(Span of) noexcept:
    """Whether a parser would take these bytes for a message: of any fields, but without groups."""
    cdef unsigned long long tag
    cdef Py_ssize_t size
    while of.at != NULL and of.at < of.end:
        tag = varint(&of)
        if of.at == NULL or not 8 <= tag <= MOST_SMALL:
            return False
        if tag & 7 == INTEGER:
            varint(&of)
        elif tag & 7 == PREFIXED:
            prefixed(&of)
        elif tag & 7 == EIGHT_BYTES or tag & 7 == FOUR_BYTES:
            size = 8 if tag & 7 == EIGHT_BYTES else 4
            of.at = of.at + size if of.end - of.at >= size else NULL
        else:
            return False
    return of.at != NULL


cdef bint small(Span content, Small* found) noexcept:
    """Looks at a column of integers; False when one of them is none of 32 bits."""
    cdef unsigned long long number
    memset(found, 0, sizeof(found[0]))
    while content.at < content.end:
        number = varint(&content)
        if content.at == NULL or number > MOST_SMALL:
            return False
        found.count += 1
        found.total += number
        if number > found.highest:
            found.highest = number
    return True


cdef Py_ssize_t wide(Span content) noexcept:
    """How many integers of 64 bits there are; -1 when a parser would not take them."""
    cdef Py_ssize_t count = 0, length = 0
    while content.at < content.end:
        length += 1
        if length > 10 or (length == 10 and content.at[0] > 1):
            return -1
        if content.at[0] < 0x80:
            count += 1
            length = 0
        content.at += 1
    return count if length == 0 else -1


cdef char* put(char* to, const void* content, Py_ssize_t size) noexcept:
    memcpy(to, content, size)
    return to + size


cdef char* put_length(char* to, unsigned int length) noexcept:
    cdef int place
    for place in range(4):
        to[place] = <char> (length >> (24 - 8 * place) & 0xFF)
    return to + 4


cdef char* put_number(char* to, unsigned long long bits) noexcept:
    cdef int place
    to = put_length(to, 8)
    for place in range(8):
        to[place] = <char> (bits >> (56 - 8 * place) & 0xFF)
    return to + 8


cdef char* put_null(char* to) noexcept:
    return put_length(to, 0xFFFF_FFFF)


cdef char* put_double(char* to, const unsigned char* of) noexcept:
    cdef double number
    cdef unsigned long long bits
    memcpy(&number, of, 8)  # little-endian, as every machine that this is compiled for
    if number != number:
        return put_null(to)
    memcpy(&bits, of, 8)
    return put_number(to, bits)


cdef long long eight_bytes(const unsigned char* of) noexcept:
    cdef long long number
    memcpy(&number, of, 8)
    return number


cdef long long towards_zero(long long nanoseconds) noexcept:
    """In microseconds; `//` rounds down, as in Python."""
    return nanoseconds // 1_000 if nanoseconds >= 0 else -(-nanoseconds // 1_000)


cdef Py_ssize_t longest(list parts) except -1:
    cdef Py_ssize_t most = 0
    for part in parts:
        most = max(most, PyBytes_GET_SIZE(part))
    return most


cdef class Plain:
    """An entry of decisions that this module takes; made by `read`."""

    cdef bytes entry  # to which the spans point
    cdef Span[FIELDS] columns
    cdef Py_ssize_t[FIELDS] counts
    cdef readonly Py_ssize_t rows
    cdef readonly bytes shared
    cdef readonly list orders, answers, attempts
    cdef readonly set days
    cdef readonly list keyed

    cdef bint split(self, Span batch):
        """Finds what stands where; False when fields are unknown, out of their order or of another type."""
        cdef unsigned long long tag
        cdef int number, before = 0
        cdef const unsigned char* began
        cdef Span content
        memset(self.columns, 0, sizeof(self.columns))
        memset(self.counts, 0, sizeof(self.counts))
        while batch.at < batch.end:
            began = batch.at
            tag = varint(&batch)
            if batch.at == NULL or tag & 7 != PREFIXED or tag >> 3 >= FIELDS:
                return False
            number = <int> (tag >> 3)
            if not KNOWN[number] or number < before:
                return False
            content = prefixed(&batch)
            if batch.at == NULL or (TEXT[number] and not is_text(content)):
                return False
            if number == before:
                if PACKED[number] or number == SHARED or number == FEATURE_SET:
                    return False
            else:
                self.columns[number].at = content.at if PACKED[number] else began
            before = number
            self.columns[number].end = content.end
            self.counts[number] += 1
            if number == SHARED or number == ORDERS or number == ANSWERS or number == ATTEMPTS:
                part = PyBytes_FromStringAndSize(<const char*> content.at, content.end - content.at)
                if number == SHARED:
                    self.shared = part
                else:
                    (self.orders if number == ORDERS else self.answers if number == ANSWERS else self.attempts).append(part)
            elif number == BOOKS and not is_message(content):
                return False
        return True

    cdef bint is_whole(self):
        """As `entries.entry_of` judges it, of an entry whose rows bring no scores of parts."""
        cdef Small of_attempts, found
        cdef int number
        cdef Py_ssize_t rows = self.counts[DECISION_ID]
        self.rows = rows
        for number in range(FIELDS):
            if EIGHT[number] and self.columns[number].end - self.columns[number].at != 8 * rows:
                return False
        if not self.counts[ORDER_REF] == self.counts[LEDGER] == rows:
            return False
        if self.counts[IDEMPOTENCY_KEY] and self.counts[IDEMPOTENCY_KEY] != rows:
            return False
        if self.counts[PART_SCORE] or wide(self.columns[AGE_US]) != rows:
            return False
        if not self.chooses(ORDER, ORDERS, rows) or not self.chooses(ANSWER, ANSWERS, rows):
            return False
        if not self.chooses(MODEL_INPUT, MODEL_INPUTS, rows) or not self.chooses(BOOK, BOOKS, rows):
            return False
        for number in (ALLOWED, USED):
            if not small(self.columns[number], &found) or found.count != rows:
                return False
        if not small(self.columns[ATTEMPT_COUNT], &of_attempts) or of_attempts.count != rows:
            return False
        if of_attempts.total > MOST_SMALL or not self.chooses(ATTEMPT, ATTEMPTS, of_attempts.total):
            return False
        for number in (ATTEMPT_USED, ATTEMPT_INDEX):
            if not small(self.columns[number], &found) or <unsigned long long> found.count != of_attempts.total:
                return False
        return small(self.columns[REST_ROW], &found) and found.count == self.counts[REST]

    cdef bint chooses(self, int column, int table, Py_ssize_t rows):
        """Whether there is a choice for each row, of what is there."""
        cdef Small found
        if not small(self.columns[column], &found) or found.count != rows:
            return False
        return found.highest <= <unsigned long long> self.counts[table]

    cdef note(self):
        """Which days the decisions are of, and which of them have an idempotency key."""
        cdef Span ids = self.columns[DECISION_ID], keys = self.columns[IDEMPOTENCY_KEY], decision_id, key
        cdef Py_ssize_t row
        cdef long long day, known = 0
        self.days, self.keyed = set(), []
        for row in range(self.rows):
            day = eight_bytes(self.columns[DECIDED_AT].at + 8 * row) // 86_400_000_000_000
            if row == 0 or day != known:
                self.days.add(day)
                known = day
            if self.counts[IDEMPOTENCY_KEY]:
                decision_id, key = text(&ids), text(&keys)
                if key.at < key.end:
                    self.keyed.append((<const char*> decision_id.at)[:decision_id.end - decision_id.at].decode("ascii"))

    def write(self, bytes start, long long position, list orders, list answers, bytes server):
        """The rows as COPY data.

        Args:
            start: How each of them begins.
            position: The entry's.
            orders: The fields of each part of the table, after those of none.
            answers: The same.
            server: The fields that all rows have.
        """
        cdef Span* columns = self.columns
        cdef Span of_order = columns[ORDER], of_answer = columns[ANSWER], used = columns[USED]
        cdef Span allowed = columns[ALLOWED]
        cdef Span ids = columns[DECISION_ID], refs = columns[ORDER_REF], keys = columns[IDEMPOTENCY_KEY]
        cdef Py_ssize_t row, most
        cdef long long number
        cdef bint has_keys = self.counts[IDEMPOTENCY_KEY] > 0
        cdef char* began
        cdef char* to
        cdef bytes part
        if len(orders) <= self.counts[ORDERS] or len(answers) <= self.counts[ANSWERS]:
            raise ValueError("a part of the tables is missing")
        most = PyBytes_GET_SIZE(start) + longest(orders) + longest(answers) + PyBytes_GET_SIZE(server)
        most = (most + NUMBER_COLUMNS * NUMBER_ROOM + TEXT_COLUMNS * TEXT_ROOM) * self.rows + 1
        most += (ids.end - ids.at) + (refs.end - refs.at) + (keys.end - keys.at)
        began = to = <char*> malloc(most)
        if began == NULL:
            raise MemoryError
        try:
            for row in range(self.rows):
                to = put(to, PyBytes_AS_STRING(start), PyBytes_GET_SIZE(start))
                part = orders[varint(&of_order)]
                to = put(to, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
                part = answers[varint(&of_answer)]
                to = put(to, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
                to = put(to, PyBytes_AS_STRING(server), PyBytes_GET_SIZE(server))
                to = put_double(to, columns[QUANTITY].at + 8 * row)
                to = put_double(to, columns[LIMIT_PRICE].at + 8 * row)
                to = put_double(to, columns[SCORE].at + 8 * row)
                to = put_number(to, varint(&used))
                to = put_number(to, varint(&allowed))
                to = put_number(to, position)
                to = put_number(to, row)
                number = eight_bytes(columns[DECIDED_AT].at + 8 * row) // 1_000
                to = put_number(to, number - POSTGRES_EPOCH_US)
                number = eight_bytes(columns[FEATURE_AGE].at + 8 * row)
                to = put_null(to) if number == WITHOUT_AGE else put_number(to, towards_zero(number))
                to = put_text(to, text(&ids))
                to = put_text(to, text(&refs))
                to = put_key(to, text(&keys)) if has_keys else put_null(to)
            return PyBytes_FromStringAndSize(began, to - began)
        finally:
            free(began)


cdef Span text(Span* column) noexcept:
    """The next text of a column."""
    varint(column)  # its tag
    return prefixed(column)


cdef char* put_text(char* to, Span content) noexcept:
    to = put_length(to, <unsigned int> (content.end - content.at))
    return put(to, content.at, content.end - content.at)


cdef char* put_key(char* to, Span content) noexcept:
    return put_text(to, content) if content.at < content.end else put_null(to)


def read(bytes entry):
    """The entry, or None when it is not a plain one of decisions."""
    cdef Span whole, batch
    cdef Plain plain
    whole.at = <const unsigned char*> PyBytes_AS_STRING(entry)
    whole.end = whole.at + PyBytes_GET_SIZE(entry)
    if varint(&whole) != <unsigned long long> (ENTRY << 3 | PREFIXED) or whole.at == NULL:
        return None
    batch = prefixed(&whole)
    if whole.at == NULL or whole.at != whole.end:
        return None
    plain = Plain.__new__(Plain)
    plain.entry, plain.shared = entry, b""
    plain.orders, plain.answers, plain.attempts = [], [], []
    if not plain.split(batch) or not plain.is_whole():
        return None
    plain.note()
    return plain
