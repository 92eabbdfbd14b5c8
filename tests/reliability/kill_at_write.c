/* Kills its process at one of the system calls by which it changes files below a
   directory: before the call, or, of those that write, with half of it done.

   Loaded before all other libraries (LD_PRELOAD), so that every call of the C library
   goes through it, whoever makes it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char watched[4096];
static atomic_long seen;
static long last = -1;
static int torn;

/* From now on: count, and end at the given call (the first is 0; none: -1). */
void kill_at(const char *directory, long call, int half_done) {
  last = call;
  torn = half_done;
  atomic_store(&seen, 0);
  snprintf(watched, sizeof watched, "%s/", directory);
}

long calls_seen(void) { return atomic_load(&seen); }

static int is_path_watched(const char *path) {
  return watched[0] && path && strncmp(path, watched, strlen(watched)) == 0;
}

static int is_file_watched(int file) {
  char link[64], path[4096];
  if (!watched[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return is_path_watched(path);
}

static int is_the_last(void) { return atomic_fetch_add(&seen, 1) == last; }

static void end(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

#define ORIGINAL(name) \
  static __typeof__(&name) original; \
  if (!original) original = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int file, const void *bytes, size_t size) {
  ORIGINAL(write);
  if (is_file_watched(file) && is_the_last()) {
    if (torn) original(file, bytes, size / 2);
    end();
  }
  return original(file, bytes, size);
}

#define ON_FILE(name) \
  int name(int file) { \
    ORIGINAL(name); \
    if (is_file_watched(file) && is_the_last()) end(); \
    return original(file); \
  }
ON_FILE(fsync)
ON_FILE(fdatasync)

int ftruncate(int file, off_t size) {
  ORIGINAL(ftruncate);
  if (is_file_watched(file) && is_the_last()) end();
  return original(file, size);
}

int truncate(const char *path, off_t size) {
  ORIGINAL(truncate);
  if (is_path_watched(path) && is_the_last()) end();
  return original(path, size);
}

int rename(const char *from, const char *to) {
  ORIGINAL(rename);
  if (is_path_watched(to) && is_the_last()) end();
  return original(from, to);
}

int unlink(const char *path) {
  ORIGINAL(unlink);
  if (is_path_watched(path) && is_the_last()) end();
  return original(path);
}

int mkdir(const char *path, mode_t mode) {
  ORIGINAL(mkdir);
  if (is_path_watched(path) && is_the_last()) end();
  return original(path, mode);
}

#define ON_OPEN(name) \
  int name(const char *path, int flags, ...) { \
    ORIGINAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = va_arg(rest, mode_t); \
    va_end(rest); \
    if ((flags & (O_CREAT | O_TRUNC)) && is_path_watched(path) && is_the_last()) end(); \
    return original(path, flags, mode); \
  }
ON_OPEN(open)
ON_OPEN(open64)
