// slowdisk FILE MNT US: MNT/disk is FILE, and each read of it takes US microseconds, however many there are at once.
// For clients.sh: a disk for losetup --direct-io=on.
#define FUSE_USE_VERSION 314
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int disk;
static long us;

static void stat_of(fuse_ino_t ino, struct stat *st) {
    fstat(disk, st);
    st->st_ino = ino;
    if (ino == FUSE_ROOT_ID) {
        st->st_mode = S_IFDIR | 0755;
        st->st_nlink = 2;
    }
}

static void lookup(fuse_req_t req, fuse_ino_t parent, const char *name) {
    struct fuse_entry_param e = {.ino = 2, .attr_timeout = 3600, .entry_timeout = 3600};
    if (parent != FUSE_ROOT_ID || strcmp(name, "disk")) {
        fuse_reply_err(req, ENOENT);
        return;
    }
    stat_of(2, &e.attr);
    fuse_reply_entry(req, &e);
}

static void getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    struct stat st;
    (void)fi;
    stat_of(ino, &st);
    fuse_reply_attr(req, &st, 3600);
}

static void read_(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi) {
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    char *buf = malloc(size);
    ssize_t n = -1;
    (void)ino, (void)fi;
    prctl(PR_SET_TIMERSLACK, 1000);
    nanosleep(&t, NULL);
    if (buf)
        n = pread(disk, buf, size, off);
    if (n < 0)
        fuse_reply_err(req, buf ? errno : ENOMEM);
    else
        fuse_reply_buf(req, buf, n);
    free(buf);
}

static void write_(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off, struct fuse_file_info *fi) {
    ssize_t n = pwrite(disk, buf, size, off);
    (void)ino, (void)fi;
    if (n < 0)
        fuse_reply_err(req, errno);
    else
        fuse_reply_write(req, n);
}

static void fsync_(fuse_req_t req, fuse_ino_t ino, int data, struct fuse_file_info *fi) {
    (void)ino, (void)data, (void)fi;
    fuse_reply_err(req, fdatasync(disk) ? errno : 0);
}

int main(int argc, char **argv) {
    static const struct fuse_lowlevel_ops ops = {.lookup = lookup, .getattr = getattr, .read = read_, .write = write_, .fsync = fsync_};
    char *words[] = {"slowdisk", "-o", "allow_other,fsname=slowdisk"};
    struct fuse_args args = FUSE_ARGS_INIT(3, words);
    if (argc != 4 || (disk = open(argv[1], O_RDWR)) < 0)
        return 2;
    us = atol(argv[3]);
    struct fuse_session *session = fuse_session_new(&args, &ops, sizeof ops, NULL);
    struct fuse_loop_config *loop = fuse_loop_cfg_create();
    fuse_loop_cfg_set_max_threads(loop, 64);
    fuse_loop_cfg_set_idle_threads(loop, 64);
    if (!session || fuse_set_signal_handlers(session) || fuse_session_mount(session, argv[2]))
        return 1;
    int rc = fuse_session_loop_mt(session, loop);
    fuse_session_unmount(session);
    return rc;
}
