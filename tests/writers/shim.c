// Faults on request for the files of one folder, preloaded into the server: SHIM_CONTROL names a file of seven numbers,
// read anew at each call: of 1000 reads so many fail, with this errno; so many are short; of 1000 opens and stats so many
// fail, with this errno; the process stops (SIGSTOP) at that call from now on; SHIM_FOLDER is the folder.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

struct faults { int reads, read_errno, shorts, opens, open_errno, stats, stop; };

static void stop_at(int call) {
    static int wanted, calls;
    if (call != wanted) calls = 0;
    wanted = call;
    if (call && ++calls == call) raise(SIGSTOP);
}

static struct faults wanted(void) {
    static int (*real_open)(const char *, int, ...);
    static ssize_t (*real_pread)(int, void *, size_t, off_t);
    static int control = -1;
    struct faults f = {0};
    char text[128] = "";
    if (!real_open) {
        real_open = dlsym(RTLD_NEXT, "open");
        real_pread = dlsym(RTLD_NEXT, "pread");
    }
    const char *path = getenv("SHIM_CONTROL");
    if (control < 0 && path) control = real_open(path, O_RDONLY | O_CLOEXEC);
    if (control >= 0 && real_pread(control, text, sizeof text - 1, 0) > 0)
        sscanf(text, "%d %d %d %d %d %d %d", &f.reads, &f.read_errno, &f.shorts, &f.opens, &f.open_errno, &f.stats, &f.stop);
    stop_at(f.stop);
    return f;
}

static int strikes(int of_1000) {
    static unsigned state = 12345;
    state = state * 1103515245 + 12345;
    return (int)(state >> 16) % 1000 < of_1000;
}

static int is_ours(const char *path) {
    const char *folder = getenv("SHIM_FOLDER");
    return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int is_ours_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    if (strcmp(path, "anon_inode:inotify") == 0) wanted();  // a moment like any other, but it never fails
    return is_ours(path);
}

#define FAIL_READ(fd, size)                                            \
    if (is_ours_fd(fd)) {                                              \
        struct faults f = wanted();                                    \
        if (strikes(f.reads)) { errno = f.read_errno; return -1; }     \
        if ((size) > 1 && strikes(f.shorts)) size = (size) / 2;        \
    }

#define FAIL_PATH(condition, number)                                   \
    if (condition) {                                                   \
        struct faults f = wanted();                                    \
        if (strikes(f.number)) { errno = f.open_errno; return -1; }    \
    }

#define REAL(name, ...) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__)

ssize_t pread(int fd, void *to, size_t size, off_t at) { FAIL_READ(fd, size) return REAL(pread, fd, to, size, at); }
ssize_t pread64(int fd, void *to, size_t size, off64_t at) { FAIL_READ(fd, size) return REAL(pread64, fd, to, size, at); }
ssize_t read(int fd, void *to, size_t size) { FAIL_READ(fd, size) return REAL(read, fd, to, size); }
ssize_t preadv(int fd, const struct iovec *to, int n, off_t at) { int one = 0; FAIL_READ(fd, one) return REAL(preadv, fd, to, n, at); }

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    FAIL_PATH(is_ours(path), opens)
    return REAL(open, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    FAIL_PATH(is_ours(path), opens)
    return REAL(open64, path, flags, mode);
}

int stat(const char *path, struct stat *to) { FAIL_PATH(is_ours(path), stats) return REAL(stat, path, to); }
int stat64(const char *path, struct stat64 *to) { FAIL_PATH(is_ours(path), stats) return REAL(stat64, path, to); }
int fstat(int fd, struct stat *to) { FAIL_PATH(is_ours_fd(fd), stats) return REAL(fstat, fd, to); }
int fstat64(int fd, struct stat64 *to) { FAIL_PATH(is_ours_fd(fd), stats) return REAL(fstat64, fd, to); }
DIR *opendir(const char *path) { if (is_ours(path)) wanted(); return REAL(opendir, path); }
