# cython: language_level=3
"""The lane's filter: one library that Envoy loads as a dynamic module and Python imports as `server.envoy.lane_c`.

Envoy's worker thread runs the functions `envoy_dynamic_module_on_…`; they never touch a Python object. The event loop's
thread runs `take`, `Call.answer` and the rest. Between them are two lists under one lock, of events and of answers::

    worker   request_headers ─▶ request_body ─▶ [arrived] ………………………………… send_answers ─▶ [ended]   destroy ─▶ [ended]
    loop                                            take ─▶ Call … answer ─▶ [answers]    take            take

Whoever fills a list wakes the other thread once for all that comes until it looks. The worker is woken through the
filter of a call, and that of another one where this call has gone meanwhile.

A call's memory belongs to the filter, to the lists and to the Python object together: it is freed by whoever
lets go of it last. A call that was taken ends exactly once: its answer was handed to Envoy, or its caller has gone.

Source: https://github.com/envoyproxy/envoy/blob/main/source/extensions/dynamic_modules/abi/abi.h. Envoy warns about a
module that was made for another version, and loads it all the same: `server/envoy/lane.py` asks for the version.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint16_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, strlen


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_NONBLOCK
    int EFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void* into, size_t size)
    ssize_t write(int fd, const void* what, size_t size)

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec* at)
    int CLOCK_MONOTONIC

cdef extern from *:
    """
    #include <pthread.h>
    #include <stdbool.h>
    #include <stddef.h>
    #include <stdint.h>

    typedef struct { const char* at; size_t size; } Piece;
    typedef struct { const char* name; size_t name_size; const char* value; size_t value_size; } Header;

    /* They are Envoy's own, and are not there in a process that is not Envoy: weak symbols are NULL then. */
    #define OF_ENVOY(name) envoy_dynamic_module_callback_http_##name
    #define WEAK __attribute__((weak)) extern
    WEAK size_t OF_ENVOY(get_headers_size)(void* filter, int kind);
    WEAK bool OF_ENVOY(get_headers)(void* filter, int kind, Header* into);
    WEAK size_t OF_ENVOY(get_body_chunks_size)(void* filter, int kind);
    WEAK bool OF_ENVOY(get_body_chunks)(void* filter, int kind, Piece* into);
    WEAK void OF_ENVOY(send_response_headers)(void* filter, Header* headers, size_t count, bool end);
    WEAK void OF_ENVOY(send_response_data)(void* filter, Piece data, bool end);
    WEAK void OF_ENVOY(send_response_trailers)(void* filter, Header* trailers, size_t count);
    WEAK void OF_ENVOY(filter_continue_decoding)(void* filter);
    WEAK void* OF_ENVOY(filter_scheduler_new)(void* filter);
    WEAK void OF_ENVOY(filter_scheduler_commit)(void* scheduler, uint64_t event);
    WEAK void OF_ENVOY(filter_scheduler_delete)(void* scheduler);

    /* Envoy does not load a module without these. It calls them for requests that a filter makes, and for a filter
       that is the last of its chain: ours is not, and makes none. */
    #define NEVER_CALLED(name) void envoy_dynamic_module_on_http_filter_##name(void) {}
    NEVER_CALLED(config_scheduled)
    NEVER_CALLED(http_callout_done)
    NEVER_CALLED(http_stream_headers)
    NEVER_CALLED(http_stream_data)
    NEVER_CALLED(http_stream_trailers)
    NEVER_CALLED(http_stream_complete)
    NEVER_CALLED(http_stream_reset)
    NEVER_CALLED(downstream_above_write_buffer_high_watermark)
    NEVER_CALLED(downstream_below_write_buffer_low_watermark)

    /* Envoy loads this library before Python imports it: nothing here may be set by the import. */
    static pthread_mutex_t lane_lock = PTHREAD_MUTEX_INITIALIZER;
    static int lane_wake = -1;
    #define LANE_DECIDE "/pretrade.decision.v1.DecisionService/Decide"
    """
    ctypedef struct Piece:
        const char* at
        size_t size

    ctypedef struct Header:
        const char* name
        size_t name_size
        const char* value
        size_t value_size

    size_t get_headers_size "OF_ENVOY(get_headers_size)"(void*, int) nogil
    bint get_headers "OF_ENVOY(get_headers)"(void*, int, Header*) nogil
    size_t get_body_chunks_size "OF_ENVOY(get_body_chunks_size)"(void*, int) nogil
    bint get_body_chunks "OF_ENVOY(get_body_chunks)"(void*, int, Piece*) nogil
    void send_response_headers "OF_ENVOY(send_response_headers)"(void*, Header*, size_t, bint) nogil
    void send_response_data "OF_ENVOY(send_response_data)"(void*, Piece, bint) nogil
    void send_response_trailers "OF_ENVOY(send_response_trailers)"(void*, Header*, size_t) nogil
    void continue_decoding "OF_ENVOY(filter_continue_decoding)"(void*) nogil
    void* scheduler_new "OF_ENVOY(filter_scheduler_new)"(void*) nogil
    void scheduler_commit "OF_ENVOY(filter_scheduler_commit)"(void*, uint64_t) nogil
    pthread_mutex_t lock "lane_lock"
    int wake "lane_wake"
    const char* DECIDE "LANE_DECIDE"
    void scheduler_delete "OF_ENVOY(filter_scheduler_delete)"(void*) nogil


cdef enum:
    OF_REQUEST = 0  # headers of a request; and what of its body came last
    # What a filter says to headers, to a piece of a body and to trailers.
    GO_ON = 0
    STOP = 1
    STOP_AND_BUFFER = 1
    STOP_AND_DROP = 3
    # What the loop asks of a filter.
    SEND = 0
    PASS_ON = 1

    MOST_HEADERS = 32
    MOST_CARRIED = 2_048  # bytes of headers that go along; a token has some 1,000
    MOST_PIECES = 16
    MOST_BODY = 16_384
    MOST_CALLS = 8_192  # taken and not ended; `admission` bounds those that are decided
    PREFIX = 5
    MOST_DIGITS = 8  # of a timeout
    MOST_SENT = 16  # headers of a refusal


cdef struct Event:
    Event* next
    Lane_Call* call
    bint ended

cdef struct Lane_Call:
    int owners
    bint waits  # its headers are held back, its body is not there yet
    bint taken
    bint sending
    bint gone
    bint heard
    void* filter
    void* scheduler
    void* object  # the `Call` that Python knows, from the first event until the second was taken
    Lane_Call* newer  # of those that wait
    Lane_Call* older
    double arrived
    double timeout
    char* body
    size_t body_size
    char* carried
    size_t carried_size
    char* answer  # its head, its message, its trailers
    size_t head_size
    size_t message_size
    size_t trailers_size
    Lane_Call* next_answer
    Event arrival
    Event end


# All begin as zeros; see `lane_lock`.
cdef Event* first
cdef Event* last
cdef Lane_Call* oldest
cdef Lane_Call* newest
cdef Lane_Call* first_answer
cdef Lane_Call* last_answer
cdef Lane_Call* asked  # through its filter the worker was woken, which has not looked yet
cdef bint is_sending
cdef bint is_open
cdef bint is_loaded
cdef size_t under_way
cdef size_t passed_on


cdef double now() noexcept nogil:
    cdef timespec at
    clock_gettime(CLOCK_MONOTONIC, &at)
    return at.tv_sec + at.tv_nsec * 1e-9


cdef void let_go(Lane_Call* call) noexcept nogil:
    # Under the lock.
    call.owners -= 1
    if call.owners == 0:
        free(call.body)
        free(call.carried)
        free(call.answer)
        free(call)


cdef void tell(Event* event, Lane_Call* call, bint ended) noexcept nogil:
    # Under the lock. One write wakes the loop for all that comes until it takes them.
    global first, last
    cdef uint64_t one = 1
    event.next = NULL
    event.call = call
    event.ended = ended
    if last != NULL:
        last.next = event
        last = event
        return
    first = last = event
    write(wake, &one, sizeof(one))


cdef void begin_to_wait(Lane_Call* call) noexcept nogil:
    # Under the lock.
    global oldest, newest
    call.waits = True
    call.older = newest
    call.newer = NULL
    if newest == NULL:
        oldest = call
    else:
        newest.newer = call
    newest = call


cdef void stop_waiting(Lane_Call* call) noexcept nogil:
    # Under the lock.
    global oldest, newest
    if not call.waits:
        return
    call.waits = False
    if call.older == NULL:
        oldest = call.newer
    else:
        call.older.newer = call.newer
    if call.newer == NULL:
        newest = call.older
    else:
        call.newer.older = call.older


# ---- What Envoy's worker thread calls


cdef public const char* envoy_dynamic_module_on_program_init() noexcept nogil:
    return "v0.1.0"


cdef public void* envoy_dynamic_module_on_http_filter_config_new(void* config, Piece name, Piece value) noexcept nogil:
    global is_loaded
    is_loaded = True
    return &lock


cdef public void envoy_dynamic_module_on_http_filter_config_destroy(void* config) noexcept nogil:
    pass


cdef public void* envoy_dynamic_module_on_http_filter_per_route_config_new(Piece name, Piece value) noexcept nogil:
    return &lock


cdef public void envoy_dynamic_module_on_http_filter_per_route_config_destroy(void* config) noexcept nogil:
    pass


cdef public void* envoy_dynamic_module_on_http_filter_new(void* config, void* filter) noexcept nogil:
    cdef Lane_Call* call = <Lane_Call*>calloc(1, sizeof(Lane_Call))
    if call != NULL:
        call.owners = 1
        call.filter = filter
        call.timeout = -1.0
    return call


cdef public int envoy_dynamic_module_on_http_filter_request_headers(void* filter, void* mine, bint end) noexcept nogil:
    global passed_on
    cdef Lane_Call* call = <Lane_Call*>mine
    if end or not is_open or not is_plain(filter, call):
        passed_on += 1
        return GO_ON
    call.arrived = now()
    call.scheduler = scheduler_new(filter)
    pthread_mutex_lock(&lock)
    begin_to_wait(call)
    pthread_mutex_unlock(&lock)
    return STOP


cdef public int envoy_dynamic_module_on_http_filter_request_body(void* filter, void* mine, bint end) noexcept nogil:
    cdef Lane_Call* call = <Lane_Call*>mine
    if not call.waits:
        return GO_ON
    if not has_read(filter, call) or (end and not is_whole(call)):
        return pass_on(call)
    if not end:
        return STOP_AND_BUFFER
    global under_way
    pthread_mutex_lock(&lock)
    if not is_open or under_way >= MOST_CALLS:
        pthread_mutex_unlock(&lock)
        return pass_on(call)
    stop_waiting(call)
    under_way += 1
    call.owners += 1
    call.taken = True
    tell(&call.arrival, call, False)
    pthread_mutex_unlock(&lock)
    return STOP_AND_DROP


cdef public int envoy_dynamic_module_on_http_filter_request_trailers(void* filter, void* mine) noexcept nogil:
    return pass_on(<Lane_Call*>mine)


cdef int pass_on(Lane_Call* call) noexcept nogil:
    # All that was held back goes to the next filter.
    global passed_on
    pthread_mutex_lock(&lock)
    if call.waits:
        stop_waiting(call)
        passed_on += 1
    pthread_mutex_unlock(&lock)
    return GO_ON


cdef bint is_plain(void* filter, Lane_Call* call) noexcept nogil:
    # Whether all headers are those of a plain `Decide`; keeps those that go along.
    cdef Header headers[MOST_HEADERS]
    cdef size_t count = get_headers_size(filter, OF_REQUEST)
    cdef size_t size = 0
    cdef int needed = 0
    cdef size_t i
    cdef char* at
    if count > MOST_HEADERS or not get_headers(filter, OF_REQUEST, headers):
        return False
    for i in range(count):
        if is_header(&headers[i], b":method", b"POST") or is_header(&headers[i], b":path", DECIDE) or (
            is_header(&headers[i], b"content-type", b"application/grpc")
            or is_header(&headers[i], b"content-type", b"application/grpc+proto")
        ):
            needed += 1
        elif goes_along(&headers[i]):
            if is_named(&headers[i], b"grpc-timeout") and not read_timeout(&headers[i], &call.timeout):
                return False
            size += 2 * sizeof(uint16_t) + headers[i].name_size + headers[i].value_size
        elif not means_nothing(&headers[i]):
            return False
    if needed != 3 or size > MOST_CARRIED:
        return False
    if size:
        call.carried = at = <char*>malloc(size)
        if at == NULL:
            return False
        for i in range(count):
            if goes_along(&headers[i]):
                at = put_header(at, &headers[i])
        call.carried_size = size
    return True


cdef bint is_text(const char* at, size_t size, const char* text) noexcept nogil:
    return size == strlen(text) and memcmp(at, text, size) == 0


cdef bint is_named(Header* header, const char* name) noexcept nogil:
    return is_text(header.name, header.name_size, name)


cdef bint is_header(Header* header, const char* name, const char* value) noexcept nogil:
    return is_named(header, name) and is_text(header.value, header.value_size, value)


cdef bint goes_along(Header* header) noexcept nogil:
    return (
        is_named(header, b"grpc-timeout")
        or is_named(header, b"x-pretrade-arrived")
        or is_named(header, b"x-correlation-id")
        or is_named(header, b"traceparent")
        or is_named(header, b"authorization")
        or is_named(header, b"x-pretrade-peer")
    )


cdef bint means_nothing(Header* header) noexcept nogil:
    # Headers that no code of ours reads, on no path. What is compressed has `grpc-encoding`.
    return (
        is_named(header, b":scheme")
        or is_named(header, b":authority")
        or is_named(header, b"te")
        or is_named(header, b"user-agent")
        or is_named(header, b"grpc-accept-encoding")
        or is_named(header, b"accept-encoding")
        or is_named(header, b"content-length")
        or is_named(header, b"tracestate")
        or is_named(header, b"x-forwarded-proto")
        or is_named(header, b"x-request-id")
        or is_header(header, b"grpc-encoding", b"identity")
    )


cdef bint read_timeout(Header* header, double* seconds) noexcept nogil:
    # As gRPC writes it: up to eight digits and a unit.
    cdef size_t digits = header.value_size - 1
    cdef double number = 0.0
    cdef size_t i
    cdef char unit
    if header.value_size < 2 or digits > MOST_DIGITS:
        return False
    for i in range(digits):
        if not b"0"[0] <= header.value[i] <= b"9"[0]:
            return False
        number = 10.0 * number + (header.value[i] - b"0"[0])
    unit = header.value[digits]
    if unit == b"m"[0]:
        number *= 1e-3
    elif unit == b"u"[0]:
        number *= 1e-6
    elif unit == b"n"[0]:
        number *= 1e-9
    elif unit == b"M"[0]:
        number *= 60.0
    elif unit == b"H"[0]:
        number *= 3_600.0
    elif unit != b"S"[0]:
        return False
    seconds[0] = number
    return True


cdef char* put_header(char* at, Header* header) noexcept nogil:
    cdef uint16_t sizes[2]
    sizes[0] = <uint16_t>header.name_size
    sizes[1] = <uint16_t>header.value_size
    memcpy(at, sizes, sizeof(sizes))
    at += sizeof(sizes)
    memcpy(at, header.name, header.name_size)
    at += header.name_size
    memcpy(at, header.value, header.value_size)
    return at + header.value_size


cdef bint has_read(void* filter, Lane_Call* call) noexcept nogil:
    # Adds the piece of a body that has just come.
    cdef Piece pieces[MOST_PIECES]
    cdef size_t count = get_body_chunks_size(filter, OF_REQUEST)
    cdef size_t size = call.body_size
    cdef size_t i
    cdef char* body
    if not count:
        return True
    if count > MOST_PIECES or not get_body_chunks(filter, OF_REQUEST, pieces):
        return False
    for i in range(count):
        if pieces[i].size > MOST_BODY - size:
            return False
        size += pieces[i].size
    body = <char*>realloc(call.body, size + 1)
    if body == NULL:
        return False
    call.body = body
    for i in range(count):
        memcpy(body + call.body_size, pieces[i].at, pieces[i].size)
        call.body_size += pieces[i].size
    return True


cdef bint is_whole(Lane_Call* call) noexcept nogil:
    # One message, not compressed, and nothing else.
    cdef const unsigned char* at = <const unsigned char*>call.body
    if call.body_size < PREFIX or at[0] != 0:
        return False
    return (<size_t>at[1] << 24 | <size_t>at[2] << 16 | <size_t>at[3] << 8 | at[4]) == call.body_size - PREFIX


cdef public void envoy_dynamic_module_on_http_filter_scheduled(void* filter, void* mine, uint64_t event) noexcept nogil:
    cdef Lane_Call* call = <Lane_Call*>mine
    if event == PASS_ON:
        if call.waits:
            pass_on(call)
            continue_decoding(filter)
        return
    send_answers()


cdef void send_answers() noexcept nogil:
    # Sends all that are there, and what comes meanwhile. A caller may go with every part of any answer; Python holds a
    # call until it has ended.
    global first_answer, last_answer, asked, is_sending
    cdef Lane_Call* answers
    cdef Lane_Call* call
    pthread_mutex_lock(&lock)
    asked = NULL
    is_sending = True
    while first_answer != NULL:
        answers = call = first_answer
        first_answer = last_answer = NULL
        pthread_mutex_unlock(&lock)
        while call != NULL:
            if not call.gone:
                call.sending = True
                send(call)
            call = call.next_answer
        pthread_mutex_lock(&lock)
        while answers != NULL:
            call = answers
            answers = call.next_answer
            if call.sending:
                tell(&call.end, call, True)
            let_go(call)
    is_sending = False
    pthread_mutex_unlock(&lock)


cdef void have_answers_sent() noexcept nogil:
    # Under the lock.
    global first_answer, last_answer, asked
    cdef Lane_Call* call = first_answer
    if asked != NULL or is_sending:
        return
    while call != NULL and call.gone:
        first_answer = call.next_answer
        let_go(call)
        call = first_answer
    if call == NULL:
        last_answer = NULL
        return
    asked = call
    scheduler_commit(call.scheduler, SEND)


cdef void send(Lane_Call* call) noexcept nogil:
    # `destroy` runs in the midst of it when its caller goes, and with the last part.
    cdef void* filter = call.filter
    cdef Header headers[MOST_SENT]
    cdef Piece message
    cdef size_t count = read_headers(call.answer, call.head_size, headers)
    message.at = call.answer + call.head_size
    message.size = call.message_size
    send_response_headers(filter, headers, count, not call.message_size)
    if call.message_size:
        if call.gone:
            return
        send_response_data(filter, message, False)
        if call.gone:
            return
        count = read_headers(message.at + message.size, call.trailers_size, headers)
        send_response_trailers(filter, headers, count)
    call.heard = True


cdef size_t read_headers(const char* at, size_t size, Header* into) noexcept nogil:
    cdef const char* end = at + size
    cdef uint16_t sizes[2]
    cdef size_t count = 0
    while at < end and count < MOST_SENT:
        memcpy(sizes, at, sizeof(sizes))
        at += sizeof(sizes)
        into[count].name = at
        into[count].name_size = sizes[0]
        into[count].value = at + sizes[0]
        into[count].value_size = sizes[1]
        at += sizes[0] + sizes[1]
        count += 1
    return count


cdef public void envoy_dynamic_module_on_http_filter_stream_complete(void* filter, void* mine) noexcept nogil:
    pass


cdef public void envoy_dynamic_module_on_http_filter_destroy(void* mine) noexcept nogil:
    cdef Lane_Call* call = <Lane_Call*>mine
    cdef void* scheduler
    global asked
    pthread_mutex_lock(&lock)
    stop_waiting(call)
    scheduler = call.scheduler
    call.scheduler = NULL
    call.gone = True
    if call == asked:  # what was to wake the worker goes with the filter
        asked = NULL
        have_answers_sent()
    if call.taken and not call.sending:
        tell(&call.end, call, True)
    let_go(call)
    pthread_mutex_unlock(&lock)
    if scheduler != NULL:
        scheduler_delete(scheduler)


cdef public int envoy_dynamic_module_on_http_filter_response_headers(void* filter, void* mine, bint end) noexcept nogil:
    return GO_ON


cdef public int envoy_dynamic_module_on_http_filter_response_body(void* filter, void* mine, bint end) noexcept nogil:
    return GO_ON


cdef public int envoy_dynamic_module_on_http_filter_response_trailers(void* filter, void* mine) noexcept nogil:
    return GO_ON


cdef public int envoy_dynamic_module_on_http_filter_local_reply(
    void* filter, void* mine, unsigned int code, Piece details, bint reset
) noexcept nogil:
    return GO_ON


# ---- What the event loop's thread calls


cdef class Call:
    """A call that came by the lane."""

    cdef Lane_Call* _call
    cdef readonly double arrived
    """When its headers came, in monotonic seconds."""
    cdef readonly object deadline
    """Until when its caller waits, likewise; None without a limit."""
    cdef readonly bint is_bare
    """Whether nothing went along but what `arrived` and `deadline` say."""
    cdef readonly bytes message
    """Its request."""
    cdef readonly bint is_answered
    cdef public object owner
    """Whoever deals with it."""

    def __dealloc__(self):
        if self._call != NULL:
            pthread_mutex_lock(&lock)
            let_go(self._call)
            pthread_mutex_unlock(&lock)

    @property
    def headers(self):
        """The headers that went along, as pairs of bytes."""
        found = []
        cdef const char* at = self._call.carried
        cdef const char* end = at + self._call.carried_size
        cdef uint16_t sizes[2]
        while at < end:
            memcpy(sizes, at, sizeof(sizes))
            at += sizeof(sizes)
            name = PyBytes_FromStringAndSize(at, sizes[0])
            at += sizes[0]
            found.append((name, PyBytes_FromStringAndSize(at, sizes[1])))
            at += sizes[1]
        return found

    @property
    def is_gone(self):
        """Whether its caller has gone."""
        return self._call.gone

    def answer(self, bytes head not None, bytes body not None, bytes trailers not None):
        """Has Envoy send an answer; `take` says afterwards whether it did. Only the first answer counts.

        Args:
            head: Headers, as `packed` makes them.
            body: Without one the headers end the call.
            trailers: Trailers, as `packed` makes them.
        """
        cdef char* at = room_for(self, head, PyBytes_GET_SIZE(body), trailers)
        if at != NULL:
            memcpy(at, PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body))
            commit(self._call)

    def answer_with(self, bytes head not None, unsigned char tag, bytes part not None, bytes trailers not None):
        """The same for an answer whose body is one message, and that message one part.

        Args:
            head: As for `answer`.
            tag: What stands before the part and its length.
            part: Serialised.
            trailers: As for `answer`.
        """
        cdef size_t size = PyBytes_GET_SIZE(part)
        cdef size_t length = 1 + varint_size(size) + size
        cdef char* at = room_for(self, head, PREFIX + length, trailers)
        if at == NULL:
            return
        at[0] = 0
        at[1], at[2] = <char>(length >> 24), <char>(length >> 16)
        at[3], at[4] = <char>(length >> 8), <char>length
        at[5] = <char>tag
        at = put_varint(at + PREFIX + 1, size)
        memcpy(at, PyBytes_AS_STRING(part), size)
        commit(self._call)


cdef char* room_for(Call self, bytes head, size_t message_size, bytes trailers) except? NULL:
    # Where the answer's body is to be written, between its head and its trailers; NULL if it has been answered before.
    if self.is_answered:
        return NULL
    cdef Lane_Call* call = self._call
    cdef size_t head_size = PyBytes_GET_SIZE(head)
    cdef size_t trailers_size = PyBytes_GET_SIZE(trailers)
    cdef char* answer = <char*>malloc(head_size + message_size + trailers_size + 1)
    if answer == NULL:
        raise MemoryError
    self.is_answered = True
    memcpy(answer, PyBytes_AS_STRING(head), head_size)
    memcpy(answer + head_size + message_size, PyBytes_AS_STRING(trailers), trailers_size)
    call.answer = answer
    call.head_size = head_size
    call.message_size = message_size
    call.trailers_size = trailers_size
    return answer + head_size


cdef void commit(Lane_Call* call) noexcept:
    global first_answer, last_answer
    pthread_mutex_lock(&lock)
    if not call.gone:
        call.owners += 1
        if last_answer == NULL:
            first_answer = call
        else:
            last_answer.next_answer = call
        last_answer = call
        have_answers_sent()
    pthread_mutex_unlock(&lock)


cdef size_t varint_size(size_t number) noexcept nogil:
    cdef size_t size = 1
    while number >= 0x80:
        number >>= 7
        size += 1
    return size


cdef char* put_varint(char* at, size_t number) noexcept nogil:
    while number >= 0x80:
        at[0] = <char>(number & 0x7F | 0x80)
        number >>= 7
        at += 1
    at[0] = <char>number
    return at + 1


cdef bint is_bare(Lane_Call* call) noexcept nogil:
    cdef const char* at = call.carried
    cdef const char* end = at + call.carried_size
    cdef uint16_t sizes[2]
    while at < end:
        memcpy(sizes, at, sizeof(sizes))
        at += sizeof(sizes)
        if not is_text(at, sizes[0], b"grpc-timeout") and not is_text(at, sizes[0], b"x-pretrade-arrived"):
            return False
        at += sizes[0] + sizes[1]
    return True


def packed(headers):
    """Headers as `Call.answer` takes them."""
    cdef Header header
    cdef char into[MOST_CARRIED]
    cdef char* at = into
    if len(headers) > MOST_SENT:
        raise ValueError(f"{len(headers)} headers: at most {MOST_SENT} are sent")
    for name, value in headers:
        header.name, header.name_size = name, len(name)
        header.value, header.value_size = value, len(value)
        if (at - into) + 4 + header.name_size + header.value_size > MOST_CARRIED:
            raise ValueError(f"at most {MOST_CARRIED} bytes of headers are sent")
        at = put_header(at, &header)
    return PyBytes_FromStringAndSize(into, at - into)


def open_lane():
    """Takes calls from now on; the file descriptor that can be read when there is something to `take`."""
    global wake, is_open
    if wake < 0:
        wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if wake < 0:
            raise OSError("there is no eventfd")
    pthread_mutex_lock(&lock)
    is_open = True
    pthread_mutex_unlock(&lock)
    return wake


def close_lane():
    """Takes no more calls: they go on to the next filter."""
    global is_open
    pthread_mutex_lock(&lock)
    is_open = False
    pthread_mutex_unlock(&lock)


def loaded():
    """Whether Envoy has loaded this library, and has the filter in its chain."""
    return is_loaded


def passed():
    """Calls and streams that went on to the next filter so far."""
    return passed_on


def pass_on_slow(double before):
    """Has calls go on to the next filter whose headers came before an instant, and whose messages are not there."""
    cdef Lane_Call* call
    pthread_mutex_lock(&lock)
    call = oldest
    while call != NULL and call.arrived < before:
        scheduler_commit(call.scheduler, PASS_ON)
        call = call.newer
    pthread_mutex_unlock(&lock)


def take():
    """The calls that came, and those that ended, each with whether its answer was handed to Envoy."""
    global first, last, under_way
    cdef uint64_t count
    cdef Event* event
    cdef Event* following
    cdef Lane_Call* c_call
    cdef Call call
    read(wake, &count, sizeof(count))
    pthread_mutex_lock(&lock)
    event = first
    first = last = NULL
    pthread_mutex_unlock(&lock)
    arrived, ended = [], []
    while event != NULL:
        following = event.next
        c_call = event.call
        if event.ended:
            call = <Call>c_call.object
            c_call.object = NULL
            ended.append((call, c_call.heard))
            Py_DECREF(call)
            pthread_mutex_lock(&lock)
            under_way -= 1
            pthread_mutex_unlock(&lock)
        else:
            call = Call.__new__(Call)
            call._call = c_call  # it takes the list's share
            call.arrived = c_call.arrived
            call.deadline = None if c_call.timeout < 0 else c_call.arrived + c_call.timeout
            call.is_bare = is_bare(c_call)
            call.message = PyBytes_FromStringAndSize(c_call.body + PREFIX, c_call.body_size - PREFIX)
            c_call.object = <void*>call
            Py_INCREF(call)
            arrived.append(call)
        event = following
    return arrived, ended
