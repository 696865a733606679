/* Faults of a disk, a clock and a scheduler for one process tree, put between it and the C library (LD_PRELOAD). Linux; compiled by soak_faults.py.
 *
 * Nothing happens in a process without SOAK_UNDER in its environment. With it, calls on files under that folder are counted by their kind, and at the
 * SOAK_AT-th one of the kinds in SOAK_CALLS what SOAK_DO says is done:
 *
 *   kill NUMBER     the signal, before the call, after it, or (a write) in the middle of it: SOAK_WHEN is before, after or middle
 *   once ERRNO      that one call fails
 *   stay ERRNO      it and all later ones of these kinds fail
 *   short 0         from there on reads and writes give less than was asked for, at least a byte
 *   vanish 0        the folder SOAK_VANISHES is renamed to <folder>.vanished
 *   clock 0         the time of day jumps by up to ten years at every look
 *
 * Kinds: o a file opened for writing, r one opened for reading or read from, w written to, s synced to the disk, n renamed, u removed, m a folder or
 * link made, t cut or given room. SOAK_LOG is a file that gets a line "pid kind path" for every call.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

enum action { NOTHING, KILL, ONCE, STAY, SHORT, VANISH, CLOCK };
enum when { BEFORE, AFTER, MIDDLE };

static struct {
    pid_t owner;
    enum action action;
    enum when when;
    int number, log;
    long at, seen;
    unsigned random;
    char under[PATH_MAX], calls[16], vanishes[PATH_MAX];
} plan;

static int says(const char *name, const char *word) {
    const char *value = getenv(name);
    return value && !strncmp(value, word, strlen(word));
}

static void copy(char *to, size_t room, const char *name) {
    const char *value = getenv(name);
    snprintf(to, room, "%s", value ? value : "");
}

/* Whether this process has a plan: read once in each, as the environment of a fork is written after the fork. */
static int planned(void) {
    pid_t self = getpid();
    if (plan.owner == self)
        return 1;
    if (!getenv("SOAK_UNDER"))
        return 0;
    static const char *const words[] = {"nothing", "kill ", "once ", "stay ", "short ", "vanish ", "clock "};
    plan.action = NOTHING;
    for (int i = 1; i < 7; i++)
        if (says("SOAK_DO", words[i])) {
            plan.action = i;
            plan.number = atoi(getenv("SOAK_DO") + strlen(words[i]));
        }
    plan.when = says("SOAK_WHEN", "after") ? AFTER : says("SOAK_WHEN", "middle") ? MIDDLE : BEFORE;
    plan.at = getenv("SOAK_AT") ? atol(getenv("SOAK_AT")) : 0;
    plan.seen = 0;
    plan.random = (unsigned)plan.at * 2654435761u + 1;
    copy(plan.under, sizeof plan.under, "SOAK_UNDER");
    copy(plan.calls, sizeof plan.calls, "SOAK_CALLS");
    copy(plan.vanishes, sizeof plan.vanishes, "SOAK_VANISHES");
    plan.log = -1;
    if (getenv("SOAK_LOG")) {
        int handle = syscall(SYS_openat, AT_FDCWD, getenv("SOAK_LOG"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
        plan.log = handle < 0 ? -1 : fcntl(handle, F_DUPFD_CLOEXEC, 700);
        if (handle >= 0)
            syscall(SYS_close, handle);
    }
    plan.owner = self;
    return 1;
}

static unsigned draw(void) {
    plan.random = plan.random * 1664525u + 1013904223u;
    return plan.random >> 8;
}

/* The path that a call means, where it is under the folder; NULL elsewhere. */
static const char *under(int folder, const char *path, char *found) {
    if (path && path[0] == '/') {
        snprintf(found, PATH_MAX, "%s", path);
    } else {
        char link[64];
        if (folder == AT_FDCWD)
            snprintf(link, sizeof link, "/proc/self/cwd");
        else
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, found, PATH_MAX - 1);
        if (length <= 0)
            return NULL;
        found[length] = 0;
        if (path)
            snprintf(found + length, PATH_MAX - length, "/%s", path);
    }
    size_t length = strlen(plan.under);
    return !strncmp(found, plan.under, length) && (found[length] == '/' || !found[length]) ? found : NULL;
}

static void note(char kind, const char *path) {
    if (plan.log < 0)
        return;
    char line[PATH_MAX + 32];
    int length = snprintf(line, sizeof line, "%d %c %s\n", (int)plan.owner, kind, path);
    syscall(SYS_write, plan.log, line, length);
}

static void strike(void) {
    if (plan.action == KILL)
        syscall(SYS_kill, getpid(), plan.number);
    if (plan.action == VANISH) {
        char away[PATH_MAX + 16];
        snprintf(away, sizeof away, "%s.vanished", plan.vanishes);
        syscall(SYS_renameat, AT_FDCWD, plan.vanishes, AT_FDCWD, away);
    }
}

struct turn {
    int error;  /* the call is to fail with */
    int shorter;  /* it is to do less */
    int strikes;  /* when it is through, or in the middle of it */
};

/* What befalls a call. */
static struct turn turn_of(char kind, int folder, const char *path) {
    struct turn turn = {0, 0, 0};
    char found[PATH_MAX];
    int before = errno;
    if (!planned() || (plan.action == CLOCK && plan.log < 0) || !under(folder, path, found))
        goto out;
    if (kind != 'n')
        note(kind, found);
    if (!strchr(plan.calls, kind))
        goto out;
    long seen = __atomic_add_fetch(&plan.seen, 1, __ATOMIC_RELAXED);
    if (plan.action == NOTHING || plan.action == CLOCK || seen < plan.at)
        goto out;
    if (plan.action == STAY || (plan.action == ONCE && seen == plan.at))
        turn.error = plan.number;
    else if (plan.action == SHORT)
        turn.shorter = 1;
    else if (seen == plan.at && plan.action == KILL && plan.when == MIDDLE && kind == 'w')
        turn.shorter = turn.strikes = 1;
    else if (seen == plan.at && plan.action == KILL && plan.when != BEFORE)
        turn.strikes = 1;
    else if (seen == plan.at)
        strike();
out:
    errno = before;
    return turn;
}

static void end(struct turn turn) {
    if (turn.strikes) {
        int before = errno;
        strike();
        errno = before;
    }
}

#define AROUND(kind, folder, path, fails, call)                                                                                                            \
    struct turn turn = turn_of(kind, folder, path);                                                                                                        \
    if (turn.error) {                                                                                                                                      \
        errno = turn.error;                                                                                                                                \
        return fails;                                                                                                                                      \
    }                                                                                                                                                      \
    __typeof__(call) result = call;                                                                                                                        \
    end(turn);                                                                                                                                             \
    return result

static size_t less(struct turn turn, size_t asked) {
    return turn.shorter && asked > 1 ? 1 + draw() % (asked - 1) : asked;
}

static char opens(int flags) {
    return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC) ? 'o' : 'r';
}

#define OPEN(name, type)                                                                                                                                   \
    int name(const char *path, int flags, ...) {                                                                                                           \
        mode_t mode = 0;                                                                                                                                   \
        if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                                                                                                             \
            va_list more;                                                                                                                                  \
            va_start(more, flags);                                                                                                                         \
            mode = va_arg(more, mode_t);                                                                                                                   \
            va_end(more);                                                                                                                                  \
        }                                                                                                                                                  \
        AROUND(opens(flags), AT_FDCWD, path, -1, (int)syscall(SYS_openat, AT_FDCWD, path, flags | type, mode));                                            \
    }                                                                                                                                                      \
    int name##at(int folder, const char *path, int flags, ...) {                                                                                           \
        mode_t mode = 0;                                                                                                                                   \
        if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                                                                                                             \
            va_list more;                                                                                                                                  \
            va_start(more, flags);                                                                                                                         \
            mode = va_arg(more, mode_t);                                                                                                                   \
            va_end(more);                                                                                                                                  \
        }                                                                                                                                                  \
        AROUND(opens(flags), folder, path, -1, (int)syscall(SYS_openat, folder, path, flags | type, mode));                                                \
    }
#undef open
#undef openat
#undef open64
#undef openat64
OPEN(open, 0)
int open64(const char *path, int flags, ...) __attribute__((alias("open")));
int openat64(int folder, const char *path, int flags, ...) __attribute__((alias("openat")));

ssize_t read(int handle, void *bytes, size_t size) {
    struct turn turn = turn_of('r', handle, NULL);
    if (turn.error) {
        errno = turn.error;
        return -1;
    }
    ssize_t result = syscall(SYS_read, handle, bytes, less(turn, size));
    end(turn);
    return result;
}

ssize_t pread64(int handle, void *bytes, size_t size, off64_t offset) {
    struct turn turn = turn_of('r', handle, NULL);
    if (turn.error) {
        errno = turn.error;
        return -1;
    }
    ssize_t result = syscall(SYS_pread64, handle, bytes, less(turn, size), offset);
    end(turn);
    return result;
}

ssize_t pread(int handle, void *bytes, size_t size, off_t offset) __attribute__((alias("pread64")));

ssize_t preadv64(int handle, const struct iovec *parts, int number, off64_t offset) {
    REAL(preadv64);
    AROUND('r', handle, NULL, -1, real(handle, parts, number, offset));
}

ssize_t preadv64v2(int handle, const struct iovec *parts, int number, off64_t offset, int flags) {
    REAL(preadv64v2);
    AROUND('r', handle, NULL, -1, real(handle, parts, number, offset, flags));
}

ssize_t preadv(int handle, const struct iovec *parts, int number, off_t offset) __attribute__((alias("preadv64")));

ssize_t write(int handle, const void *bytes, size_t size) {
    struct turn turn = turn_of('w', handle, NULL);
    if (turn.error) {
        errno = turn.error;
        return -1;
    }
    ssize_t result = syscall(SYS_write, handle, bytes, less(turn, size));
    end(turn);
    return result;
}

ssize_t pwrite64(int handle, const void *bytes, size_t size, off64_t offset) {
    struct turn turn = turn_of('w', handle, NULL);
    if (turn.error) {
        errno = turn.error;
        return -1;
    }
    ssize_t result = syscall(SYS_pwrite64, handle, bytes, less(turn, size), offset);
    end(turn);
    return result;
}

ssize_t pwrite(int handle, const void *bytes, size_t size, off_t offset) __attribute__((alias("pwrite64")));

ssize_t writev(int handle, const struct iovec *parts, int number) {
    AROUND('w', handle, NULL, -1, (ssize_t)syscall(SYS_writev, handle, parts, number));
}

ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
    struct turn turn = turn_of('w', to, NULL);
    if (turn.error) {
        errno = turn.error;
        return -1;
    }
    ssize_t result = syscall(SYS_sendfile, to, from, offset, less(turn, size));
    end(turn);
    return result;
}

ssize_t sendfile(int to, int from, off_t *offset, size_t size) __attribute__((alias("sendfile64")));

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *there, size_t size, unsigned flags) {
    struct turn turn = turn_of('w', to, NULL);
    if (turn.error) {
        errno = turn.error;
        return -1;
    }
    ssize_t result = syscall(SYS_copy_file_range, from, at, to, there, less(turn, size), flags);
    end(turn);
    return result;
}

/* What numpy writes arrays with; inside, the C library calls its own write. */
size_t fwrite(const void *bytes, size_t size, size_t number, FILE *file) {
    REAL(fwrite);
    struct turn turn = turn_of('w', fileno(file), NULL);
    if (turn.error) {
        errno = turn.error;
        return 0;
    }
    size_t result = real(bytes, size, number, file);
    end(turn);
    return result;
}

int fsync(int handle) {
    AROUND('s', handle, NULL, -1, (int)syscall(SYS_fsync, handle));
}

int fdatasync(int handle) {
    AROUND('s', handle, NULL, -1, (int)syscall(SYS_fdatasync, handle));
}

/* Of a rename the place that it goes to says where it is. It is logged once it is done: one that a signal comes before is none. */
static int renamed(int old, const char *from, int new, const char *to) {
    struct turn turn = turn_of('n', new, to);
    if (turn.error) {
        errno = turn.error;
        return -1;
    }
    int result = (int)syscall(SYS_renameat, old, from, new, to);
    char found[PATH_MAX];
    int after = errno;
    if (!result && planned() && under(new, to, found))
        note('n', found);
    errno = after;
    end(turn);
    return result;
}

int rename(const char *from, const char *to) {
    return renamed(AT_FDCWD, from, AT_FDCWD, to);
}

int renameat(int old, const char *from, int new, const char *to) {
    return renamed(old, from, new, to);
}

int unlink(const char *path) {
    AROUND('u', AT_FDCWD, path, -1, (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0));
}

int unlinkat(int folder, const char *path, int flags) {
    AROUND('u', folder, path, -1, (int)syscall(SYS_unlinkat, folder, path, flags));
}

int rmdir(const char *path) {
    AROUND('u', AT_FDCWD, path, -1, (int)syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR));
}

int mkdir(const char *path, mode_t mode) {
    AROUND('m', AT_FDCWD, path, -1, (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode));
}

int mkdirat(int folder, const char *path, mode_t mode) {
    AROUND('m', folder, path, -1, (int)syscall(SYS_mkdirat, folder, path, mode));
}

int symlink(const char *target, const char *path) {
    AROUND('m', AT_FDCWD, path, -1, (int)syscall(SYS_symlinkat, target, AT_FDCWD, path));
}

int ftruncate64(int handle, off64_t size) {
    AROUND('t', handle, NULL, -1, (int)syscall(SYS_ftruncate, handle, size));
}

int ftruncate(int handle, off_t size) __attribute__((alias("ftruncate64")));

int posix_fallocate64(int handle, off64_t offset, off64_t size) {
    REAL(posix_fallocate64);
    struct turn turn = turn_of('t', handle, NULL);
    if (turn.error)
        return turn.error;
    int result = real(handle, offset, size);
    end(turn);
    return result;
}

int fallocate64(int handle, int mode, off64_t offset, off64_t size) {
    AROUND('t', handle, NULL, -1, (int)syscall(SYS_fallocate, handle, mode, offset, size));
}

int fallocate(int handle, int mode, off_t offset, off_t size) __attribute__((alias("fallocate64")));

int posix_fallocate(int handle, off_t offset, off_t size) __attribute__((alias("posix_fallocate64")));

/* A clock that somebody sets while the process looks at it. */
static void jump(time_t *seconds) {
    static const long most = 10L * 365 * 86400;
    if (planned() && plan.action == CLOCK)
        *seconds += (long)(draw() % 10007) * (2 * most) / 10006 - most;
}

int clock_gettime(clockid_t which, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(which, now);
    if (!result && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE))
        jump(&now->tv_sec);
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    REAL(gettimeofday);
    int result = real(now, zone);
    if (!result)
        jump(&now->tv_sec);
    return result;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now)
        *now = found.tv_sec;
    return found.tv_sec;
}
