/* Stands between a process and the C library (LD_PRELOAD): of the calls that change files below one folder, one kind
   fails from the number-th on, `times` times, or kills the process. All others, and all before storm_arm, pass. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, OPEN, WRITE, FSYNC, RENAME, MKDIR, UNLINK };

static char folder[PATH_MAX], mark[PATH_MAX];
static int armed = NONE, failure;
static long first, last;
static atomic_long seen;

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

/* call: one of the above. failure: an errno; 0 kills. The file `marked` is made when it first strikes. */
void storm_arm(const char *below, const char *marked, int call, long number, long times, int error) {
    strncpy(folder, below, sizeof folder - 1);
    strncpy(mark, marked, sizeof mark - 1);
    first = number;
    last = number + times - 1;
    failure = error;
    atomic_store(&seen, 0);
    armed = call;
}

static int strikes_path(int call, const char *path) {
    if (armed != call || path == NULL || strncmp(path, folder, strlen(folder)) != 0) return 0;
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (number < first || number > last) return 0;
    if (number == first) {
        int file = syscall(SYS_openat, AT_FDCWD, mark, O_CREAT | O_WRONLY, 0644);
        syscall(SYS_write, file, path, strlen(path));
        syscall(SYS_close, file);
    }
    if (failure == 0) raise(SIGKILL);
    errno = failure;
    return 1;
}

static int strikes(int call, int file) {
    char link[64], path[PATH_MAX];
    if (armed != call) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strikes_path(call, path);
}

ssize_t write(int file, const void *bytes, size_t count) {
    return strikes(WRITE, file) ? -1 : REAL(write)(file, bytes, count);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    return strikes(WRITE, file) ? -1 : REAL(writev)(file, parts, count);
}
ssize_t pwrite64(int file, const void *bytes, size_t count, off64_t offset) {
    return strikes(WRITE, file) ? -1 : REAL(pwrite64)(file, bytes, count, offset);
}
int fsync(int file) { return strikes(FSYNC, file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return strikes(FSYNC, file) ? -1 : REAL(fdatasync)(file); }
int rename(const char *from, const char *to) { return strikes_path(RENAME, to) ? -1 : REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return strikes_path(MKDIR, path) ? -1 : REAL(mkdir)(path, mode); }
int unlink(const char *path) { return strikes_path(UNLINK, path) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return strikes_path(UNLINK, path) ? -1 : REAL(rmdir)(path); }
int unlinkat(int base, const char *path, int flags) {
    return strikes(UNLINK, base) ? -1 : REAL(unlinkat)(base, path, flags);
}

#define OPENS(name)                                                              \
    int name(const char *path, int flags, ...) {                                 \
        va_list more;                                                            \
        va_start(more, flags);                                                   \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;  \
        va_end(more);                                                            \
        if ((flags & O_CREAT) && strikes_path(OPEN, path)) return -1;            \
        return REAL(name)(path, flags, mode);                                    \
    }
OPENS(open)
OPENS(open64)
