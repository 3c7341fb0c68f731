/* A wall clock that a test moves under a running program: preloaded, it adds the seconds that a mapped file says.
 *
 * As when somebody sets the system's clock, only what asks for the time of day is told another; the monotonic clock and
 * all waiting go on as before. Absolute waits by the wall clock are moved back by as much, for the kernel's did not move.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define AN_EPOCH_TIME 1000000000L /* no monotonic clock has come as far */

static const volatile long *moved;

__attribute__((constructor)) static void map(void) {
  const char *path = getenv("WALL_CLOCK_MOVED");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *mapped = mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
  if (mapped != MAP_FAILED) moved = mapped;
  close(file);
}

static long seconds(void) { return moved ? *moved : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
  int failed = (int)syscall(SYS_clock_gettime, clock, now);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += seconds();
  return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  int failed = (int)syscall(SYS_gettimeofday, now, zone);
  if (!failed) now->tv_sec += seconds();
  return failed;
}

time_t time(time_t *now) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (now) *now = exact.tv_sec;
  return exact.tv_sec;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
  struct timespec real = *until;
  if (real.tv_sec < AN_EPOCH_TIME) return pthread_cond_clockwait(condition, mutex, CLOCK_MONOTONIC, &real);
  real.tv_sec -= seconds();
  return pthread_cond_clockwait(condition, mutex, CLOCK_REALTIME, &real);
}
