#!/usr/bin/env bash
# huge.sh [RUNS] - how long a directory of a million entries keeps whoever comes first.
# As root. Prints the median and all values of RUNS (default 5) runs, each on a fresh dst, for directories of
# 1,000, 100,000 and 1,000,000 tiny files, with the walker at work and without it:
#   the first lookup of one of its names, the first entry of its listing, and p99 of 200 more lookups in the
#   two seconds after that; the first new file, written, and p99 of 50 more.
# SIZES="1000 1000000" chooses, LIST=1 adds the time until all were listed, DIR=/somewhere puts it elsewhere,
# MIRRORFS=... is the program (a release build is found by itself). 1,000,000 files need 4 GiB and as many
# inodes on each side.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec python3 - "$here" "${1:-5}" <<'PY'
import os, random, statistics, subprocess, sys, time
here, runs = sys.argv[1], int(sys.argv[2])
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(here, '../crash'))
import lab

sizes = [int(n) for n in os.environ.get('SIZES', '1000 100000 1000000').split()]
if 'DIR' in os.environ:
    os.environ['TMPDIR'] = os.environ['DIR']
lab.own_namespace()
work = lab.scratch('mirrorfs-huge.')
LIMITS = {'first lookup': 5.0, 'first entry': 20.0}


def name(i):
    return 'message.%07d' % (i * 7_368_787 % 10_000_000)


def make(src, n):
    t = time.time()
    os.makedirs(src + '/huge')
    at = os.open(src + '/huge', os.O_RDONLY)
    for i in range(n):
        fd = os.open(name(i), os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=at)
        if i % 10 == 0:
            os.write(fd, b'a few bytes\n')
        os.close(fd)
    os.close(at)
    os.sync()
    print('%d files: %.0f s to make' % (n, time.time() - t), flush=True)


def timed(act):
    t = time.perf_counter()
    value = act()
    return (time.perf_counter() - t) * 1e3, value


def mounted(src, round, args, act):
    dst, at = '%s/dst%d' % (work, round), work + '/mnt'
    os.makedirs(dst)
    os.makedirs(at, exist_ok=True)
    subprocess.run([lab.binary(), 'mount', *args, src, dst, at], check=True)
    pid = int([l for l in lab.ask('status', at, '--json')[1].splitlines() if '"pid"' in l][0].split(':')[1].strip(' ,'))
    try:
        os.stat(at + '/huge')
        return act(at + '/huge')
    finally:
        subprocess.run(['umount', '-l', at])
        end = time.monotonic() + 60
        while os.path.exists('/proc/%d' % pid) and time.monotonic() < end:
            time.sleep(0.01)
        if os.path.exists('/proc/%d' % pid):
            os.kill(pid, 9)


def look(n):
    def act(huge):
        picks = random.sample(range(n), min(n, 201))
        first, _ = timed(lambda: os.stat(huge + '/' + name(picks[0])))
        more = []
        for i in picks[1:]:
            more.append(timed(lambda: os.stat(huge + '/' + name(i)))[0])
            time.sleep(0.01)
        return {'first lookup': first, 'p99 of 200 lookups': sorted(more)[int(len(more) * 0.99)]}
    return act


def listing(n):
    def act(huge):
        t = time.perf_counter()
        it = os.scandir(huge)
        next(it)
        out = {'first entry': (time.perf_counter() - t) * 1e3}
        if os.environ.get('LIST'):
            assert sum(1 for _ in it) == n - 1
            out['all entries'] = (time.perf_counter() - t) * 1e3
        return out
    return act


def make_new(huge):
    def act(i):
        fd = os.open('%s/new.%d' % (huge, i), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, b'a few bytes\n')
        os.close(fd)
    first, _ = timed(lambda: act(0))
    more = [timed(lambda: act(i))[0] for i in range(1, 51)]
    return {'first new file': first, 'p99 of 50 new files': sorted(more)[int(len(more) * 0.99)]}


bad, round = False, 0
try:
    for n in sizes:
        src = '%s/src%d' % (work, n)
        make(src, n)
        for what, args in (('walker at work', []), ('no walker', ['--no-background'])):
            found = {}
            for _ in range(runs):
                for act in (look(n), listing(n), make_new):
                    round += 1
                    for k, v in mounted(src, round, args, act).items():
                        found.setdefault(k, []).append(v)
            for k, v in found.items():
                m = statistics.median(v)
                ok = k not in LIMITS or m <= LIMITS[k]
                bad |= not ok
                limit = '  limit %2.0f ms: %s' % (LIMITS[k], 'ok' if ok else 'MISSED') if k in LIMITS else ''
                print('%9d entries, %-14s  %-20s median %9.2f ms%s   (%s)' % (n, what, k, m, limit, ' '.join('%.2f' % x for x in sorted(v))), flush=True)
finally:
    lab.remove(work)
sys.exit(1 if bad else 0)
PY
