// mount.c - one workload on one directory for so many seconds; prints how often it went a second.
//   mount WORKLOAD DIR SECONDS
// DIR holds files/0 ... files/999 of 4 KiB and big, as mount.sh makes them.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { FILES = 1000, BLOCK = 1 << 20 };
static char buf[BLOCK];
static int big = -1;
static size_t big_len;

static void die(const char *what) { perror(what); exit(1); }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static const char *name(long n) {
    static char text[64];
    snprintf(text, sizeof text, "files/%ld", n % FILES);
    return text;
}

static void open_big(int flags) {
    struct stat st;
    if (big < 0 && ((big = open("big", flags)) < 0 || fstat(big, &st))) die("big");
    if (!big_len) big_len = st.st_size;
}

static void step(const char *what, long n) {
    struct stat st;
    struct statx stx;
    if (!strcmp(what, "stat")) {
        if (stat(name(n), &st)) die("stat");
    } else if (!strcmp(what, "ask")) {  // Past the kernel's cache of attributes.
        if (statx(AT_FDCWD, name(n), AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &stx)) die("statx");
    } else if (!strcmp(what, "open")) {
        int fd = open(name(n), O_RDONLY);
        if (fd < 0 || read(fd, buf, 4096) != 4096) die("open");
        close(fd);
    } else if (!strcmp(what, "create")) {
        int fd = open("files/new", O_CREAT | O_EXCL | O_WRONLY, 0644);
        if (fd < 0 || write(fd, buf, 4096) != 4096) die("create");
        close(fd);
        if (unlink("files/new")) die("unlink");
    } else if (!strcmp(what, "read")) {
        open_big(O_RDONLY);
        if (pread(big, buf, BLOCK, (n * (size_t)BLOCK) % big_len) != BLOCK) die("read");
    } else if (!strcmp(what, "write")) {  // Always the same 16 MiB: the page cache, not the disk.
        open_big(O_RDWR);
        if (pwrite(big, buf, BLOCK, (n % 16) * (size_t)BLOCK) != BLOCK) die("write");
    } else if (!strcmp(what, "random")) {
        static unsigned long x = 88172645463325252ul;
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        open_big(O_RDONLY);
        if (pread(big, buf, 4096, x % (big_len / 4096) * 4096) != 4096) die("random");
    } else if (!strcmp(what, "mmap")) {
        open_big(O_RDONLY);
        volatile unsigned char *at = mmap(NULL, big_len, PROT_READ, MAP_SHARED, big, 0);
        if (at == MAP_FAILED) die("mmap");
        unsigned sum = 0;
        for (size_t i = 0; i < big_len; i += 4096) sum += at[i];
        munmap((void *)at, big_len);
    } else {
        fprintf(stderr, "no workload %s\n", what);
        exit(2);
    }
}

int main(int argc, char **argv) {
    if (argc != 4 || chdir(argv[2])) die("usage: mount WORKLOAD DIR SECONDS");
    double seconds = atof(argv[3]);
    step(argv[1], 0);
    double begin = now(), end;
    long n = 0;
    do {
        for (int i = 0; i < 8; i++) step(argv[1], n++);
        end = now();
    } while (end - begin < seconds);
    printf("%.1f\n", n / (end - begin));
}
