#!/usr/bin/env python3
"""sync-power.py: power cuts during `mirrorfs sync` (powercut.sh starts it, with WHAT=sync). As root.

  sync-power.py prepare LAB     makes LAB/src0 and LAB/src1: the same names and sizes, other bytes and times
  sync-power.py write LAB       $DST is the disk that will lose its power, $ACK takes what is promised
  sync-power.py check LAB       $DST is the disk afterwards, $ACKED what had been promised before the cut

The writer copies src0 and then src1 over it into $DST/dst0, dst1, ..., while somebody else calls sync(2) at random
moments; what a run that ended had promised is acknowledged. The checker expects what was acknowledged to be there,
then runs the command that was cut once more and compares: whatever the cut has left, the second run must see it and
put it right. A file that has the right size and time but not its bytes is what it must not be deceived by: LAB/hits
counts those that the cuts produced, so that one sees that the danger was there. FSYNC=end|file|never chooses the
writer's --fsync (never promises nothing about what a run that ended had copied).
"""
import os
import random
import shutil
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import lab

KEPT = 3                    # copies that are on the disk at once
MIB = 1 << 20


def fill(path, rng, size, holes=None, reserve=False):
    """A file of random bytes; with `holes` only every such stretch begins with 64 KiB of them."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    if reserve:
        os.posix_fallocate(fd, 0, size)
    elif holes:
        for at in range(0, size, holes):
            os.pwrite(fd, rng.randbytes(64 << 10), at)
        os.ftruncate(fd, size)
    else:
        for at in range(0, size, MIB):
            os.pwrite(fd, rng.randbytes(min(MIB, size - at)), at)
    os.close(fd)


def prepare(where):
    for k in (0, 1):
        src, rng, sizes = '%s/src%d' % (where, k), random.Random(k), random.Random(7)
        for d in range(8):
            os.makedirs('%s/d%d' % (src, d))
        for i in range(400):
            fill('%s/d%d/small%d' % (src, i % 8, i), rng, sizes.choice([1, 100, 4000, 9000, 40_000, 200_000]))
        for i in range(4):
            fill('%s/sparse%d' % (src, i), rng, 32 * MIB, holes=MIB)
        fill(src + '/reserved', rng, 2 * MIB, reserve=True)
        for i in range(2):
            fill('%s/large%d' % (src, i), rng, 24 * MIB)
        for i in range(20):
            os.link('%s/d0/small%d' % (src, 8 * i), '%s/d1/link%d' % (src, i))
        for at, dirs, files in os.walk(src, topdown=False):
            for n in files + ['.']:
                t = lab.T0 + k * 10**9 + sizes.randrange(10**9)
                os.utime(at + '/' + n, ns=(t, t))


def sync(src, dst, *options):
    return subprocess.run([lab.binary(), 'sync', *options, src, dst], stdout=subprocess.DEVNULL).returncode


def write(where):
    dst, w = os.environ['DST'], lab.Writer()
    rng = random.Random(int(os.environ.get('SEED', '1')))
    how = '--fsync=' + os.environ.get('FSYNC', 'end')

    def somebody_else():
        while True:
            time.sleep(rng.choice([0.05, 0.2, 1]))
            os.sync()
    threading.Thread(target=somebody_else, daemon=True).start()
    for n in range(10_000):
        at = '%s/dst%d' % (dst, n)
        for k in (0, 1):
            w.promise('begin', n, k)
            if sync('%s/src%d' % (where, k), at, how) != 0:
                lab.die('sync failed')
            w.promise('end', n, k)
        if n >= KEPT:
            w.promise('gone', n - KEPT)
            shutil.rmtree('%s/dst%d' % (dst, n - KEPT))


def deceptive(src, dst):
    """Files with src's size and time that do not have its bytes."""
    found = []
    for at, _, files in os.walk(src):
        for n in files:
            a, b = at + '/' + n, dst + (at + '/' + n)[len(src):]
            try:
                x, y = os.lstat(a), os.lstat(b)
                if (x.st_size, x.st_mtime_ns) == (y.st_size, y.st_mtime_ns) and lab.read(a) != lab.read(b):
                    found.append(b)
            except FileNotFoundError:
                pass
    return found


def differences(src, dst):
    tool = lab.kit('treecmp.py') or lab.die('no treecmp.py: set MIRRORFS_KIT')
    p = subprocess.run([sys.executable, tool, src, dst], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return [] if p.returncode == 0 else p.stdout.splitlines()[:5]


def check(where):
    dst, state, bad = os.environ['DST'], {}, []
    for w in lab.promised():
        state[int(w[1])] = w
    for n, w in sorted(state.items()):
        if w[0] == 'gone':
            continue
        k, at = int(w[2]), '%s/dst%d' % (dst, n)
        src = '%s/src%d' % (where, k)
        if w[0] == 'end' and os.environ.get('FSYNC') != 'never':
            # The next run may have begun: only then is it not what was promised.
            if (n, k) == max((m, int(v[2])) for m, v in state.items() if v[0] != 'gone') or k == 1:
                bad += ['promised: ' + d for d in differences(src, at)]
            continue
        if os.path.isdir(at):
            hits = deceptive(src, at)
            with open(where + '/hits', 'a') as f:
                f.writelines(h + '\n' for h in hits)
        if sync(src, at) != 0:
            bad.append('dst%d: the second run failed' % n)
        bad += ['dst%d after the second run: %s' % (n, d) for d in differences(src, at)]
    for line in bad[:10]:
        print(line)
    sys.exit(1 if bad else 0)


if __name__ == '__main__':
    lab.main(__doc__, prepare, write, check)
