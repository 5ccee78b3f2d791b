/* Stands between a process and libc (LD_PRELOAD) for files under one folder: fails the N-th operation, or writes all of
 * them down.
 *
 *   SHIM_ROOT   absolute path; only what is under it counts
 *   SHIM_COUNT  file that gets the number of operations at the end (appended, one line a process)
 *   SHIM_AT     the operation that fails, counted from 1 in this process; 0 none
 *   SHIM_HOW    ENOSPC, EIO, or SHORT: a write that takes half of what it was given, which is no error
 *   SHIM_LOG    file that gets every operation, see `note`
 *
 * Operations: open for writing (o), write (w), fsync (s), rename (r), unlink and rmdir (u), mkdir (d), truncate (t).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILES 65536
static char *opened[FILES]; /* path by file descriptor, for those under the root */
static char root[PATH_MAX];
static size_t root_length;
static long at, counted;
static int code, is_short, log_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

static void put(int fd, const void *bytes, size_t n) {
    while (n) {
        ssize_t done = syscall(SYS_write, fd, bytes, n);
        if (done <= 0) return;
        bytes = (const char *)bytes + done;
        n -= done;
    }
}

__attribute__((constructor)) static void begin(void) {
    const char *value = getenv("SHIM_ROOT");
    if (!value) return;
    snprintf(root, sizeof root, "%s", value);
    root_length = strlen(root);
    at = (value = getenv("SHIM_AT")) ? atol(value) : 0;
    value = getenv("SHIM_HOW");
    is_short = value && !strcmp(value, "SHORT");
    code = value && !strcmp(value, "ENOSPC") ? ENOSPC : EIO;
    if ((value = getenv("SHIM_LOG"))) log_fd = syscall(SYS_openat, AT_FDCWD, value, O_WRONLY | O_CREAT | O_APPEND, 0644);
}

__attribute__((destructor)) static void end(void) {
    const char *value = getenv("SHIM_COUNT");
    if (!value || !root_length || !counted) return;
    int fd = syscall(SYS_openat, AT_FDCWD, value, O_WRONLY | O_CREAT | O_APPEND, 0644);
    char line[32];
    put(fd, line, snprintf(line, sizeof line, "%ld\n", counted));
    syscall(SYS_close, fd);
}

/* The absolute path, without looking at links; 0 when it is not under the root. */
static int place(int dir, const char *path, char *out) {
    if (!root_length || !path) return 0;
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
    } else {
        char base[PATH_MAX], name[64];
        ssize_t n;
        snprintf(name, sizeof name, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
        if ((n = readlink(name, base, sizeof base - 1)) < 0) return 0;
        base[n] = 0;
        if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
    }
    size_t n = strlen(out);
    while (n > 1 && out[n - 1] == '/') out[--n] = 0;
    return !strncmp(out, root, root_length) && (out[root_length] == '/' || !out[root_length]);
}

/* One record: operation, offset (or new size), lengths of two paths and of the bytes, then these. */
static void note(char what, const char *path, const char *to, int64_t offset, const void *bytes, size_t n) {
    if (log_fd < 0) return;
    uint32_t sizes[3] = {strlen(path), to ? strlen(to) : 0, bytes ? n : 0};
    put(log_fd, &what, 1);
    put(log_fd, &offset, 8);
    put(log_fd, sizes, sizeof sizes);
    put(log_fd, path, sizes[0]);
    if (to) put(log_fd, to, sizes[1]);
    if (bytes) put(log_fd, bytes, n);
}

/* Counts; true when this operation is the one that fails. */
static int fails(void) { return ++counted == at; }

#define ENTER pthread_mutex_lock(&lock)
#define LEAVE pthread_mutex_unlock(&lock)

static int opening(int dir, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT), ours = place(dir, path, full);
    ENTER;
    if (ours && writes && fails() && !is_short) {
        LEAVE;
        errno = code;
        return -1;
    }
    struct stat before;
    int was = ours && writes ? !syscall(SYS_newfstatat, dir, path, &before, 0) : 1;
    int fd = syscall(SYS_openat, dir, path, flags, mode);
    if (fd >= 0 && fd < FILES) {
        free(opened[fd]);
        opened[fd] = ours ? strdup(full) : NULL;
        if (ours && writes && !was) note('o', full, NULL, 0, NULL, 0);
        if (ours && writes && was && (flags & O_TRUNC)) note('t', full, NULL, 0, NULL, 0);
    }
    LEAVE;
    return fd;
}

#define MODE                              \
    mode_t mode = 0;                      \
    if (flags & (O_CREAT | O_TMPFILE)) {  \
        va_list more;                     \
        va_start(more, flags);            \
        mode = va_arg(more, mode_t);      \
        va_end(more);                     \
    }

int open(const char *path, int flags, ...) { MODE return opening(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opening(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE return opening(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE return opening(dir, path, flags | O_LARGEFILE, mode); }

int close(int fd) {
    if (fd >= 0 && fd < FILES && opened[fd]) {
        ENTER;
        free(opened[fd]);
        opened[fd] = NULL;
        LEAVE;
    }
    return syscall(SYS_close, fd);
}

static ssize_t writing(int fd, const void *bytes, size_t n, off_t offset) {
    ENTER;
    if (fails()) {
        if (!is_short || n < 2) {
            LEAVE;
            errno = code;
            return -1;
        }
        n /= 2;
    }
    int64_t where = offset >= 0 ? offset : lseek(fd, 0, fcntl(fd, F_GETFL) & O_APPEND ? SEEK_END : SEEK_CUR);
    ssize_t done = offset >= 0 ? syscall(SYS_pwrite64, fd, bytes, n, offset) : syscall(SYS_write, fd, bytes, n);
    if (done > 0) note('w', opened[fd], NULL, where, bytes, done);
    LEAVE;
    return done;
}

#define OURS(fd) ((fd) >= 0 && (fd) < FILES && opened[fd])

ssize_t write(int fd, const void *bytes, size_t n) {
    return OURS(fd) ? writing(fd, bytes, n, -1) : syscall(SYS_write, fd, bytes, n);
}
ssize_t pwrite(int fd, const void *bytes, size_t n, off_t offset) {
    return OURS(fd) ? writing(fd, bytes, n, offset) : syscall(SYS_pwrite64, fd, bytes, n, offset);
}
ssize_t pwrite64(int fd, const void *bytes, size_t n, off_t offset) { return pwrite(fd, bytes, n, offset); }
ssize_t writev(int fd, const struct iovec *parts, int n) {
    if (!OURS(fd)) return syscall(SYS_writev, fd, parts, n);
    ssize_t sum = 0;
    for (int i = 0; i < n; i++) {
        ssize_t done = write(fd, parts[i].iov_base, parts[i].iov_len);
        if (done < 0) return sum ? sum : -1;
        sum += done;
        if ((size_t)done < parts[i].iov_len) break;
    }
    return sum;
}

static int on_open(int fd, char what, long number, off_t size) {
    ENTER;
    if (fails() && !is_short) {
        LEAVE;
        errno = code;
        return -1;
    }
    int result = number == SYS_ftruncate ? syscall(number, fd, size) : syscall(number, fd);
    if (!result) note(what, opened[fd], NULL, size, NULL, 0);
    LEAVE;
    return result;
}

int fsync(int fd) { return OURS(fd) ? on_open(fd, 's', SYS_fsync, 0) : syscall(SYS_fsync, fd); }
int fdatasync(int fd) { return OURS(fd) ? on_open(fd, 's', SYS_fdatasync, 0) : syscall(SYS_fdatasync, fd); }
int ftruncate(int fd, off_t size) {
    return OURS(fd) ? on_open(fd, 't', SYS_ftruncate, size) : syscall(SYS_ftruncate, fd, size);
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

static int on_path(char what, int dir, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    int ours = place(dir, path, full);
    ENTER;
    if (ours && fails() && !is_short) {
        LEAVE;
        errno = code;
        return -1;
    }
    int result = what == 'd' ? syscall(SYS_mkdirat, dir, path, mode) : syscall(SYS_unlinkat, dir, path, flags);
    if (ours && !result) note(what, full, NULL, 0, NULL, 0);
    LEAVE;
    return result;
}

int unlink(const char *path) { return on_path('u', AT_FDCWD, path, 0, 0); }
int unlinkat(int dir, const char *path, int flags) { return on_path('u', dir, path, flags, 0); }
int rmdir(const char *path) { return on_path('u', AT_FDCWD, path, AT_REMOVEDIR, 0); }
int mkdir(const char *path, mode_t mode) { return on_path('d', AT_FDCWD, path, 0, mode); }
int mkdirat(int dir, const char *path, mode_t mode) { return on_path('d', dir, path, 0, mode); }

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    char a[PATH_MAX], b[PATH_MAX];
    int ours = place(from_dir, from, a) & place(to_dir, to, b);
    ENTER;
    if (ours && fails() && !is_short) {
        LEAVE;
        errno = code;
        return -1;
    }
    int result = syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
    if (ours && !result) note('r', a, b, 0, NULL, 0);
    LEAVE;
    return result;
}
int renameat(int from_dir, const char *from, int to_dir, const char *to) { return renameat2(from_dir, from, to_dir, to, 0); }
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
