#!/usr/bin/env python3
"""neighbours.py: what neighbours.sh runs; its head tells the variables."""
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import compare

LIMIT_MIB, WORK_MIB = int(os.environ.get('LIMIT_MIB', '512')), int(os.environ.get('WORK_MIB', '96'))
ROUNDS = int(os.environ.get('ROUNDS', '3'))
MIB = compare.MIB
PAUSE_S = 0.0002                            # between two reads: work of its own
ALONE_S = 3                                 # the neighbour without the copy


class Cgroup:
    """A memory limit, by version 2 or 1, whatever is mounted."""

    def __init__(self, limit):
        two, one = '/sys/fs/cgroup/cgroup.controllers', '/sys/fs/cgroup/memory'
        if os.path.exists(two) and 'memory' in open(two).read():
            self.write('/sys/fs/cgroup/cgroup.subtree_control', '+memory')
            self.at, knob = '/sys/fs/cgroup/mirrorfs-bench-%d' % os.getpid(), 'memory.max'
        elif os.path.ismount(one):
            self.at, knob = one + '/mirrorfs-bench-%d' % os.getpid(), 'memory.limit_in_bytes'
        else:
            sys.exit('neighbours.py: no memory controller')
        os.mkdir(self.at)
        self.write('%s/%s' % (self.at, knob), str(limit))

    @staticmethod
    def write(path, words):
        with open(path, 'w') as f:
            f.write(words)

    def enter(self):
        self.write(self.at + '/cgroup.procs', str(os.getpid()))

    def close(self):
        for _ in range(50):
            try:
                return os.rmdir(self.at)
            except OSError:
                time.sleep(0.1)             # somebody is still on his way out


def neighbour(path, size):
    """Reads 4 KiB at random for ever; on each line from standard input tells the latencies (ns) since the last."""
    fd, rnd = os.open(path, os.O_RDONLY), random.Random(1)
    for at in range(0, size, MIB):
        os.pread(fd, MIB, at)
        os.pread(fd, MIB, at)               # twice: the kernel takes it for a working set
    os.set_blocking(0, False)
    took = []
    print('ready', flush=True)
    while True:
        at = rnd.randrange(size // 4096) * 4096
        begin = time.perf_counter_ns()
        os.pread(fd, 4096, at)
        took.append(time.perf_counter_ns() - begin)
        time.sleep(PAUSE_S)
        if len(took) % 64 == 0:
            try:
                asked = os.read(0, 100)
            except BlockingIOError:
                continue
            if not asked:
                return
            took.sort()
            print(len(took), took[len(took) // 2], took[len(took) * 99 // 100], flush=True)
            took = []


def resident(paths):
    """Cached MiB of files."""
    out = subprocess.run(['fincore', '--bytes', '--raw', '--noheadings', '-o', 'RES', *paths], check=True, stdout=subprocess.PIPE, text=True)
    return sum(int(n) for n in out.stdout.split()) / MIB


def files(top):
    return [os.path.join(d, f) for d, _, fs in os.walk(top) for f in fs]


def forget(paths):
    for path in paths:
        with open(path, 'rb') as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one(command, top, cgroup):
    src, dst, work = top + '/tree', top + '/copy', top + '/work'
    shutil.rmtree(dst, ignore_errors=True)
    os.sync()
    forget(files(src) + [work])
    them = subprocess.Popen([sys.executable, os.path.abspath(__file__), '--neighbour', work], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, preexec_fn=cgroup.enter)
    def ask():
        them.stdin.write('now\n')
        them.stdin.flush()
        return [int(n) for n in them.stdout.readline().split()]
    try:
        them.stdout.readline()
        time.sleep(ALONE_S)
        alone = ask()
        begin = time.monotonic()
        copy = subprocess.Popen([w.format(s=src, d=dst) for w in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=cgroup.enter)
        status = copy.wait()
        clock = time.monotonic() - begin
        busy = ask()
        return {'status': status, 'clock': clock, 'alone': alone, 'busy': busy, 'work': resident([work]),
                'src': resident(files(src)), 'dst': resident(files(dst))}
    finally:
        them.stdin.close()
        them.wait()


def commands():
    cache = [v for v in ('keep', 'drop', 'direct') if takes_cache(v)]
    ours = compare.TOOLS['mirrorfs sync'][1]
    found = {'mirrorfs sync': ours}
    for value in cache:
        found['mirrorfs sync --cache ' + value] = [*ours[:2], '--cache', value, *ours[2:]]
    for tool in ('cp -a', 'rsync -aHAX', 'xcp'):
        if shutil.which(compare.TOOLS[tool][0]):
            found[tool] = compare.TOOLS[tool][1]
    return found


def takes_cache(value):
    said = subprocess.run([compare.MIRRORFS, 'sync', '--help'], stdout=subprocess.PIPE, text=True).stdout
    return '--cache' in said and value in said[said.index('--cache'):][:600]


def main():
    if sys.argv[1:2] == ['--neighbour']:
        return neighbour(sys.argv[2], os.path.getsize(sys.argv[2]))
    top = tempfile.mkdtemp(prefix='mirrorfs-neighbours.', dir=os.environ.get('DIR'))
    cgroup = Cgroup(LIMIT_MIB * MIB)
    try:
        os.mkdir(top + '/tree')
        for i in range(3):
            with open('%s/tree/big%d' % (top, i), 'wb') as f:
                for _ in range(LIMIT_MIB // 4):
                    f.write(compare.POOL)
        with open(top + '/work', 'wb') as f:
            for _ in range(WORK_MIB // 4 + 1):
                f.write(compare.POOL)
            f.truncate(WORK_MIB * MIB)
        tools = commands()
        results = {tool: [] for tool in tools}
        for _ in range(ROUNDS):
            for tool in tools:
                results[tool].append(one(tools[tool], top, cgroup))
        print('\nA tree of %d MiB, a limit of %d MiB, a working set of %d MiB; medians of %d\n' % (3 * LIMIT_MIB, LIMIT_MIB, WORK_MIB, ROUNDS))
        print('| tool | clock s | p50 us alone, during | p99 us alone, during | working set still cached | src cached MiB | dst cached MiB |')
        print('| --- | --- | --- | --- | --- | --- | --- |')
        for tool, rows in results.items():
            mid = lambda get: statistics.median(get(r) for r in rows)
            print('| %s%s | %.1f | %.1f, %.1f | %.0f, %.0f | %.0f %% | %.0f | %.0f |' % (
                tool, '' if not any(r['status'] for r in rows) else ' (failed)', mid(lambda r: r['clock']),
                mid(lambda r: r['alone'][1] / 1e3), mid(lambda r: r['busy'][1] / 1e3), mid(lambda r: r['alone'][2] / 1e3), mid(lambda r: r['busy'][2] / 1e3),
                100 * mid(lambda r: r['work']) / WORK_MIB, mid(lambda r: r['src']), mid(lambda r: r['dst'])), flush=True)
    finally:
        shutil.rmtree(top, ignore_errors=True)
        cgroup.close()


if __name__ == '__main__':
    main()
