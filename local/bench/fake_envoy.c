/* What a filter sees of Envoy, for one worker thread: requests come and go as a test says, and events that were
   scheduled for a filter reach it only while it is there. Loaded before the filter's library, whose symbols find these. */
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

typedef struct { const char* at; size_t size; } Piece;
typedef struct { const char* name; size_t name_size; const char* value; size_t value_size; } Header;
enum { MOST = 64, MOST_SENT = 32768 };

/* The filter under test. */
struct Filter {
  void* (*begin)(void*, void*);
  int (*headers)(void*, void*, bool);
  int (*body)(void*, void*, bool);
  int (*trailers)(void*, void*);
  void (*scheduled)(void*, void*, uint64_t);
  void (*destroy)(void*);
} under_test;

typedef struct Request {
  void* filter;
  Header headers[MOST];
  size_t header_count;
  Piece pieces[MOST];
  size_t piece_count;
  char* text;
  char sent[MOST_SENT];
  size_t sent_size;
  int parts, leaves_after;
  bool there, went_on;
  int holders;
  struct Request* along;
  volatile int held, stands;
} Request;

typedef struct Posted { struct Posted* next; Request* request; uint64_t event; } Posted;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Posted *first, *last;
static int wake = -1;

static void release(Request* r) {
  pthread_mutex_lock(&lock);
  int left = --r->holders;
  pthread_mutex_unlock(&lock);
  if (!left) { free(r->text); free(r); }
}

/* Envoy's side of the interface. */
#define CALLBACK(name) envoy_dynamic_module_callback_http_##name
size_t CALLBACK(get_headers_size)(Request* r, int kind) { return r->header_count; }
bool CALLBACK(get_headers)(Request* r, int kind, Header* into) {
  memcpy(into, r->headers, r->header_count * sizeof *into);
  return true;
}
size_t CALLBACK(get_body_chunks_size)(Request* r, int kind) { return r->piece_count; }
bool CALLBACK(get_body_chunks)(Request* r, int kind, Piece* into) {
  memcpy(into, r->pieces, r->piece_count * sizeof *into);
  return true;
}
void fake_leave(Request* r) {
  if (!r->there) return;
  r->there = false;
  under_test.destroy(r->filter);
  if (r->along) fake_leave(r->along);
}
static void send(Request* r, char kind, const char* at, size_t size) {
  while (r->held) { r->stands = 1; sched_yield(); }
  if (!r->there) abort(); /* its filter was destroyed: nothing may be sent for it */
  if (r->sent_size + size + 5 > MOST_SENT) return;
  r->sent[r->sent_size++] = kind;
  uint32_t n = size;
  memcpy(r->sent + r->sent_size, &n, 4);
  memcpy(r->sent + r->sent_size + 4, at, size);
  r->sent_size += 4 + size;
  if (++r->parts == r->leaves_after) fake_leave(r);
}
static void send_headers(Request* r, char kind, Header* headers, size_t count) {
  char text[MOST_SENT];
  size_t size = 0;
  for (size_t i = 0; i < count && size + headers[i].name_size + headers[i].value_size + 2 < sizeof text; i++) {
    memcpy(text + size, headers[i].name, headers[i].name_size);
    size += headers[i].name_size;
    text[size++] = '=';
    memcpy(text + size, headers[i].value, headers[i].value_size);
    size += headers[i].value_size;
    text[size++] = '\n';
  }
  send(r, kind, text, size);
}
void CALLBACK(send_response_headers)(Request* r, Header* headers, size_t count, bool end) {
  send_headers(r, end ? 'E' : 'H', headers, count);
  if (end) fake_leave(r); /* as Envoy: the filter is destroyed within */
}
void CALLBACK(send_response_data)(Request* r, Piece data, bool end) { send(r, 'D', data.at, data.size); }
void CALLBACK(send_response_trailers)(Request* r, Header* trailers, size_t count) {
  send_headers(r, 'T', trailers, count);
  fake_leave(r);
}
void CALLBACK(filter_continue_decoding)(Request* r) { r->went_on = true; }
void* CALLBACK(filter_scheduler_new)(Request* r) {
  pthread_mutex_lock(&lock);
  r->holders++;
  pthread_mutex_unlock(&lock);
  Request** scheduler = malloc(sizeof *scheduler);
  *scheduler = r;
  return scheduler;
}
void CALLBACK(filter_scheduler_delete)(Request** scheduler) { release(*scheduler); free(scheduler); }
void CALLBACK(filter_scheduler_commit)(Request** scheduler, uint64_t event) {
  Posted* posted = malloc(sizeof *posted);
  *posted = (Posted){NULL, *scheduler, event};
  pthread_mutex_lock(&lock);
  posted->request->holders++;
  uint64_t one = 1;
  if (last) last->next = posted;
  else {
    first = posted;
    if (wake >= 0 && write(wake, &one, sizeof one) < 0) abort();
  }
  last = posted;
  pthread_mutex_unlock(&lock);
}

/* What a test does, always in one thread. Headers are `name=value\n`. */
Request* fake_begin(const char* headers, size_t size) {
  Request* r = calloc(1, sizeof *r);
  r->holders = 1;
  r->there = true;
  r->text = malloc(size + 1);
  memcpy(r->text, headers, size);
  char *at = r->text, *end = at + size;
  while (at < end && r->header_count < MOST) {
    char* line = memchr(at, '\n', end - at);
    char* equals = line ? memchr(at, '=', line - at) : NULL;
    if (!equals) break;
    r->headers[r->header_count++] = (Header){at, equals - at, equals + 1, line - equals - 1};
    at = line + 1;
  }
  r->filter = under_test.begin(&under_test, r);
  return r;
}
int fake_headers(Request* r, bool end) { return under_test.headers(r, r->filter, end); }
int fake_body(Request* r, const char* data, size_t size, size_t piece, bool end) {
  char* own = malloc(size + 1); /* of exactly this size: reading past its end is seen */
  memcpy(own, data, size);
  r->piece_count = 0;
  for (size_t at = 0; at < size && r->piece_count < MOST; at += piece)
    r->pieces[r->piece_count++] = (Piece){own + at, size - at < piece ? size - at : piece};
  int said = under_test.body(r, r->filter, end);
  r->piece_count = 0;
  free(own);
  return said;
}
int fake_trailers(Request* r) { return under_test.trailers(r, r->filter); }
void fake_leaves_after(Request* r, int parts) { r->leaves_after = parts; }
void fake_hold(Request* r, bool held) { r->held = held; }
bool fake_stands(Request* r) { return r->stands; }
void fake_takes_along(Request* r, Request* other) { r->along = other; }
bool fake_went_on(Request* r) { return r->went_on; }
bool fake_is_there(Request* r) { return r->there; }
size_t fake_sent(Request* r, char* into) { memcpy(into, r->sent, r->sent_size); return r->sent_size; }
void fake_forget(Request* r) { fake_leave(r); release(r); }
/* The file descriptor that can be read when something was scheduled. */
int fake_wake(void) {
  if (wake < 0) wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  return wake;
}
size_t fake_run(void) {
  size_t done = 0;
  uint64_t count;
  if (wake >= 0) (void)!read(wake, &count, sizeof count);
  for (;; done++) {
    pthread_mutex_lock(&lock);
    Posted* posted = first;
    if (posted && !(first = posted->next)) last = NULL;
    pthread_mutex_unlock(&lock);
    if (!posted) return done;
    if (posted->request->there) under_test.scheduled(posted->request, posted->request->filter, posted->event);
    release(posted->request);
    free(posted);
  }
}

/* Plain calls that come at once: how many of them the filter takes. */
size_t fake_burst(Request** into, size_t count, const char* headers, size_t size, const char** bodies, const size_t* sizes) {
  size_t taken = 0;
  for (size_t i = 0; i < count; i++) {
    into[i] = fake_begin(headers, size);
    taken += fake_headers(into[i], false) == 1 && fake_body(into[i], bodies[i], sizes[i], sizes[i], true) == 3;
  }
  return taken;
}
/* How many of some calls have not ended. */
size_t fake_left(Request** calls, size_t count) {
  size_t there = 0;
  for (size_t i = 0; i < count; i++) there += calls[i]->there;
  return there;
}
