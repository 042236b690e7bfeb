#!/usr/bin/env bash
# foreground.sh [RUNS] - what the walker costs whoever works in the mount meanwhile. As root.
# Each of RUNS (default 5) runs mounts a fresh dst without the walker and with it, in turn, and does for SECONDS (2), or until
# the walker is done:
#   reads      open, read and close of files that are here already, one after the other: files a second
#   accesses   the first open and read of files that are not here, 500 a second at most: p50 and p99
#   changes    a new file in a directory that nobody has looked at, 100 a second at most: p50 and p99
# Prints medians and exits with 1 when reads keep less than 90 % of their speed or the p99 of accesses more than doubles.
# FILES=60000 makes the tree smaller or larger, DIR=/somewhere puts it elsewhere (a local disk), MIRRORFS=... is the program.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec python3 - "$here" "${1:-5}" <<'PY'
import os, statistics, sys, time
here, runs = sys.argv[1], int(sys.argv[2])
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(here, '../crash'))
import lab

files = int(os.environ.get('FILES', 60_000))
seconds = float(os.environ.get('SECONDS', 2))
EACH = 50
if 'DIR' in os.environ:
    os.environ['TMPDIR'] = os.environ['DIR']
lab.own_namespace()
work = lab.scratch('mirrorfs-bench.')
src, at = work + '/src', work + '/mnt'
dirs = files // EACH
HERE = 200                                      # Files that are read again and again.


def make():
    os.makedirs(src)
    body = os.urandom(64 << 10)
    for d in range(dirs):
        os.mkdir('%s/d%05d' % (src, d))
        for i in range(EACH):
            with open('%s/d%05d/f%02d' % (src, d, i), 'wb') as f:
                f.write(body[:1000 + (d * 37 + i * 911) % 20_000])
    os.sync()


def read(path):
    fd = os.open(path, os.O_RDONLY)
    while os.read(fd, 1 << 17):
        pass
    os.close(fd)


def times(what, pace, m):
    """How long each call took, and how many a second there were."""
    out, begin = [], time.perf_counter()
    for n, path in enumerate(what):
        due = begin + n / pace if pace else 0
        while (now := time.perf_counter()) < due:
            time.sleep(due - now)
        if now - begin > seconds or m.proc.poll() is not None:
            break
        path()
        out.append(time.perf_counter() - now)
    return out, len(out) / (time.perf_counter() - begin)


def create(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))


def one(kind, walker, n):
    # A new dst each time, none removed before the end: ext4 searches long for inodes that were not just deleted.
    dst = '%s/dst-%s-%s-%d' % (work, kind, walker, n)
    os.makedirs(dst)
    os.makedirs(at, exist_ok=True)
    m = lab.Mount(src, dst, at, work + '/log', () if walker else ('--no-background',))
    try:
        # The walker takes the newest directory first: what is old is pending for long.
        if kind == 'reads':
            some = ['%s/d%05d/f%02d' % (at, i // EACH, i % EACH) for i in range(HERE)]
            for path in some:
                read(path)
            work_ = ((lambda p=some[i % HERE]: read(p)) for i in range(10**9))
            return times(work_, 0, m)
        if kind == 'accesses':
            work_ = ((lambda i=i: read('%s/d%05d/f%02d' % (at, 10 + i // 4, i % 4))) for i in range((dirs - 10) * 4))
            return times(work_, 500, m)
        work_ = ((lambda i=i: create('%s/d%05d/new' % (at, 10 + i))) for i in range(dirs - 10))
        return times(work_, 100, m)
    finally:
        os.system('umount -l ' + at)
        m.kill()


def ms(values, part):
    values = sorted(values)
    return values[min(len(values) - 1, int(part * len(values)))] * 1e3


bad = False
try:
    make()
    for kind in ('reads', 'accesses', 'changes'):
        rows = {False: [], True: []}
        for n in range(runs):
            for walker in (False, True):
                took, rate = one(kind, walker, n)
                rows[walker].append((rate, ms(took, .5), ms(took, .99)))
        rate, p50, p99 = ([statistics.median(r[i] for r in rows[w]) for w in (False, True)] for i in range(3))
        print('%-9s without: %7.0f/s p50 %6.2f ms p99 %7.2f ms   with the walker: %7.0f/s p50 %6.2f ms p99 %7.2f ms'
              % (kind, rate[0], p50[0], p99[0], rate[1], p50[1], p99[1]), flush=True)
        bad |= kind == 'reads' and rate[1] < 0.9 * rate[0] or kind == 'accesses' and p99[1] > 2 * p99[0]
finally:
    lab.remove(work)
sys.exit(1 if bad else 0)
PY
