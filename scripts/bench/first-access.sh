#!/usr/bin/env bash
# first-access.sh [RUNS] - how long until a tree of 200,000 files can be used after `mount` returned.
# As root. Prints the median and all values of RUNS (default 7) runs, each on a fresh dst with cold caches of
# dst and warm ones of src:
#   the first `ls -l` of the root, the first `cat` of a small file, the first 4 KiB of a file of 10 GiB, and of a sparse file
#   of 100 GiB (`image`): open and the first 4 KiB, the first write (4 KiB) into it, an fsync of that. Before that write a file is
#   made beside it: the first change in a directory, whatever it is, waits until the directory is durable in dst.
# FILES=200000 and BIG=10737418240 (bytes) make the tree smaller, DIR=/somewhere puts it elsewhere (a local disk),
# EXTRA="--no-background" adds arguments of mount, MIRRORFS=... is the program (a release build is found by itself).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec python3 - "$here" "${1:-7}" <<'PY'
import json, os, statistics, subprocess, sys, threading, time
here, runs = sys.argv[1], int(sys.argv[2])
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(here, '../crash'))
import lab

files = int(os.environ.get('FILES', 200_000))
big = int(os.environ.get('BIG', 10 << 30))
if 'DIR' in os.environ:
    os.environ['TMPDIR'] = os.environ['DIR']
lab.own_namespace()
work = lab.scratch('mirrorfs-bench.')
src, at = (work + '/' + x for x in ('src', 'mnt'))
LIMITS = {'mount returned': None, 'ls -l of the root': 0.100, 'cat of a small file': 0.005, '4 KiB of the big file': 0.020,
          'open + 4 KiB of the image': 0.002, 'a new file in the root': None, 'open + write into the image': 0.005, 'fsync of that': None}


def make():
    t = time.time()
    os.makedirs(src)
    body = b'a small file\n' * 40
    for d in range(files // 1000):
        os.mkdir('%s/d%03d' % (src, d))
        for i in range(1000):
            fd = os.open('%s/d%03d/f%04d' % (src, d, i), os.O_WRONLY | os.O_CREAT, 0o644)
            os.write(fd, body[:i * 37 % len(body)])
            os.close(fd)
    with open(src + '/small', 'wb') as f:
        f.write(body)
    with open(src + '/big', 'wb') as f:         # Data at its start and in its middle; it counts as 10 GiB.
        f.write(os.urandom(64 << 20))
        f.seek(big // 2)
        f.write(os.urandom(64 << 20))
        f.truncate(big)
    with open(src + '/image', 'wb') as f:
        f.write(os.urandom(1 << 20))
        f.truncate(100 << 30)
        f.seek(60 << 30)
        f.write(os.urandom(1 << 20))
    os.sync()
    print('tree: %d files in %d directories and one of %.1f GiB, %.0f s to make' % (files, files // 1000, big / 2**30, time.time() - t))


def timed(*cmd):
    # A fork of a small process and one wait: what a user at a shell would see. (A wait with a time limit polls.)
    t = time.perf_counter()
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    limit = threading.Timer(120, p.kill)
    limit.start()
    out = p.stdout.read()
    p.wait()
    t = time.perf_counter() - t
    limit.cancel()
    if p.returncode:
        raise SystemExit('%s: %s' % (' '.join(cmd), out.decode(errors='replace')))
    return t, out


def one(round):
    # A new one each time, none removed before the end: ext4 searches long for inodes that were not just deleted.
    dst = '%s/dst%d' % (work, round)
    os.makedirs(dst)
    os.makedirs(at, exist_ok=True)
    out = {}
    out['mount returned'], _ = timed(lab.binary(), 'mount', *os.environ.get('EXTRA', '').split(), src, dst, at)
    pid = None
    try:
        out['ls -l of the root'], listing = timed('ls', '-l', at)
        assert len(listing.splitlines()) == files // 1000 + 4, listing[-500:]
        out['cat of a small file'], b = timed('cat', at + '/small')
        assert b == lab.read(src + '/small')
        out['4 KiB of the big file'], b = timed('head', '-c', '4096', at + '/big')
        assert b == open(src + '/big', 'rb').read(4096)
        t = time.perf_counter()
        fd = os.open(at + '/image', os.O_RDONLY)
        os.pread(fd, 4096, 0)
        out['open + 4 KiB of the image'] = time.perf_counter() - t
        os.close(fd)
        t = time.perf_counter()
        open(at + '/new', 'x').close()
        out['a new file in the root'] = time.perf_counter() - t
        t = time.perf_counter()
        fd = os.open(at + '/image', os.O_RDWR)
        os.pwrite(fd, bytes(4096), 30 << 30)
        out['open + write into the image'] = time.perf_counter() - t
        t = time.perf_counter()
        os.fsync(fd)
        out['fsync of that'] = time.perf_counter() - t
        os.close(fd)
        state = json.loads(lab.ask('status', at, '--json')[1])
        state = state[0] if isinstance(state, list) else state
        pid = state['pid']
    finally:
        subprocess.run(['umount', '-l', at])
        end = time.monotonic() + 20
        while pid and os.path.exists('/proc/%d' % pid) and time.monotonic() < end:
            time.sleep(0.01)
        if pid and os.path.exists('/proc/%d' % pid):
            os.kill(pid, 9)
    return out


bad = False
try:
    make()
    empty = statistics.median(timed('cat', '/dev/null')[0] for _ in range(9))
    print('starting a program that does nothing takes %.1f ms of each of these' % (empty * 1e3))
    all_ = [one(i) for i in range(runs)]
    for what, limit in LIMITS.items():
        v = sorted(r[what] * 1e3 for r in all_)
        m = statistics.median(v)
        ok = limit is None or m < limit * 1e3
        bad |= not ok
        print('%-24s median %7.1f ms%s   (%s)' % (what, m, '' if limit is None else '  limit %3.0f ms: %s' % (limit * 1e3, 'ok' if ok else 'MISSED'),
                                                 ' '.join('%.1f' % x for x in v)))
finally:
    lab.remove(work)
sys.exit(1 if bad else 0)
PY
