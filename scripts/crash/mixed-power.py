#!/usr/bin/env python3
"""mixed-power.py: power cuts around large files that are changed before they are here (powercut.sh, WHAT=mixed). As root.

  mixed-power.py prepare LAB    makes LAB/src
  mixed-power.py write LAB      $DST is the disk that will lose its power, $ACK takes what is promised
  mixed-power.py check LAB      $DST is the disk afterwards, $ACKED what had been promised before the cut

One large file in each migration is written into, cut, extended and punched at random while most of it is pending; some
migrations pull in the background, some do not, some lose their daemon by SIGKILL in between. Now and then it is synced
(fsync, fdatasync, msync, O_DSYNC, syncfs of the disk), and that is acknowledged. After the cut each byte must be one that
the file had at the last acknowledged sync or later: src's only where nobody had synced another, zeros only where somebody
made them.

KIND=beside: somebody calls syncfs all the time while the file is written, which writes the map and the bytes in any order
(M2). KIND=whole: it becomes whole with users' bytes that nobody has synced, while others commit dst's journal all the time
(M5). KIND=cut: it is cut, and its directory synced: a log of btrfs then has the new mark and the size of before (M4). KIND=grow:
src's file has grown between two daemons, and the directory is synced after the first change: the same for the mark that says that the file is mixed
(M1).
"""
import ctypes
import json
import mmap
import os
import random
import sys
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import lab

KIND = os.environ.get('KIND', 'ops')
# What becomes whole is long in becoming durable.
SIZE, OPS = 24_000_001 if KIND == 'whole' else 1_500_001, 60
PIECES = [(0, 300_000), (320_000, 324_000), (600_001, 900_000), (1_000_000, SIZE)]
LARGE = ['-o', 'large=64K']
PUNCH, ZERO, KEEP = 2, 16, 1
fallocate = lab.libc.fallocate
fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def original():
    all_ = bytearray(SIZE)
    for a, b in PIECES:
        all_[a:b] = lab.data('src %d' % a, b - a)
    return bytes(all_)


def prepare(where):
    os.makedirs(where + '/src')
    with open(where + '/src/f', 'wb') as f:
        for a, b in PIECES:
            f.seek(a)
            f.write(lab.data('src %d' % a, b - a))


def choose(rng, size):
    what = rng.choices(['write', 'sync', 'datasync', 'syncfs', 'dsync', 'msync', 'cut', 'punch', 'zero', 'read', 'kill'],
                       [30, 5, 7, 3, 3, 2, 3, 4, 2, 6, 1])[0]
    at = rng.choice([rng.randrange(SIZE), rng.randrange(SIZE) // 4096 * 4096, max(0, size - rng.randrange(6000))])
    n = rng.choice([1, 100, 4096, 4097, 8192, 60_000])
    if what == 'cut':
        at = rng.randrange(SIZE // 2, SIZE + 20_000)
    if what == 'msync':
        at = min(at, size - 5000) // 4096 * 4096
    return [what, at, n, rng.randrange(10**9)]


def data(op):
    return lab.data('write %d' % op[3], 5000 if op[0] == 'msync' else op[2])


def apply(all_, op):
    """The file after an operation."""
    what, at, n, _ = op
    if what in ('write', 'dsync', 'msync'):
        b = data(op)
        return all_[:at].ljust(at, b'\0') + b + all_[at + len(b):]
    if what == 'cut':
        return all_[:at].ljust(at, b'\0')
    if what in ('punch', 'zero'):
        end = min(at + n, len(all_))
        return all_ if end <= at else all_[:at] + bytes(end - at) + all_[end:]
    return all_


SYNCS = ('sync', 'datasync', 'syncfs', 'msync')


def do(path, fd, op, disk):
    what, at, n, _ = op
    if what == 'write':
        b = data(op)
        if os.pwrite(fd, b, at) != len(b):
            raise OSError('short write')
    elif what == 'dsync':
        own = os.open(path, os.O_WRONLY | os.O_DSYNC)
        os.pwrite(own, data(op), at)
        os.close(own)
    elif what == 'msync':
        m = mmap.mmap(fd, os.fstat(fd).st_size)
        m[at:at + 5000] = data(op)
        m.flush()
        m.close()
        os.fsync(fd)
    elif what == 'cut':
        os.ftruncate(fd, at)
    elif what in ('punch', 'zero'):
        if fallocate(fd, (PUNCH if what == 'punch' else ZERO) | KEEP, at, n):
            raise OSError(ctypes.get_errno(), 'fallocate')
    elif what == 'read':
        os.pread(fd, n, at)
    elif what == 'sync':
        os.fsync(fd)
    elif what == 'datasync':
        os.fdatasync(fd)
    elif what == 'syncfs':
        if lab.libc.syncfs(disk):
            raise OSError(ctypes.get_errno(), 'syncfs')


def src_of(where, mig):
    return '%s/grow%d' % (where, mig) if KIND == 'grow' else where + '/src'


def mount(src, where, root, at, background):
    args = LARGE if background else LARGE + ['--no-background']
    m = lab.Mount(src, root, at, where + '/log', args)
    if not background:
        lab.ask('pause', at)
    return m


def sync_name(at, name):
    """A new name for the file, its directory synced: btrfs logs what it has of the inode, without its size."""
    os.link(at + '/f', at + '/' + name)
    d = os.open(at, os.O_RDONLY)
    os.fsync(d)
    os.close(d)


def one(where, mig, at, dst, w, log):
    """A migration of the other kinds than ops."""
    root, src = '%s/dst%d' % (dst, mig), src_of(where, mig)
    rng, count = random.Random(os.environ.get('SEED', '1') + KIND + str(mig)), iter(range(10_000))
    if KIND == 'grow':
        os.mkdir(src)
        with open(src + '/f', 'wb') as f:
            f.write(original()[:300_000])
        w.mount = mount(src, where, root, at, False)
        os.stat(at + '/f')
        os.mkdir(at + '/now')   # It has all names, durably.
        w.mount.stop()
        with open(src + '/f', 'r+b') as f:
            f.write(original())
    w.mount = mount(src, where, root, at, False)
    fd = os.open(at + '/f', os.O_RDWR)

    def op(what, pos=0, n=0):
        k = next(count)
        words = [what, pos, n, rng.randrange(10**9)]
        log.write(json.dumps([mig, k, words]) + '\n')
        log.flush()
        do(at + '/f', fd, words, None)
        return k

    if KIND == 'beside':
        disk = os.open(dst, os.O_RDONLY)
        beside = lab.Beside(lambda: lab.libc.syncfs(disk))
        for k in range(150):
            op('write', rng.randrange(SIZE // 4096) * 4096, rng.choice([4096, 8192, 20_480]))
            time.sleep(rng.choice([0, 0, 0.001, 0.004]))
            if k % 15 == 14:
                w.promise(mig, op('sync'))
        beside.end()
        os.close(disk)
    elif KIND == 'whole':
        for k in range(4):
            op('write', k * 6_000_000 + rng.randrange(1_000_000), 4_000_000)
        beside = lab.Beside(lab.noise(dst))
        lab.ask('resume', at)
        end = time.monotonic() + 5
        while time.monotonic() < end and any(m in os.listxattr(root + '/f') for m in lab.MARKS):
            time.sleep(0.002)
        beside.end()
        w.promise(mig, op('sync'))
    elif KIND == 'cut':
        for k in range(10):
            op('write', rng.randrange(200_000), 4096)
            op('cut', SIZE - (k + 1) * 100_000 + rng.randrange(4096))
            sync_name(at, 'name%d' % k)
            time.sleep(rng.choice([0, 0.01, 0.05]))
        w.promise(mig, op('sync'))
    else:
        op('write', 700_000, 4096)
        sync_name(at, 'name')
        time.sleep(rng.choice([0.02, 0.1]))
        w.promise(mig, op('sync'))
    os.close(fd)
    w.mount.stop()
    w.mount = None


def write(where):
    dst, at = os.environ['DST'], where + '/mnt'
    os.makedirs(at, exist_ok=True)
    log, w = open(where + '/ops', 'w'), lab.Writer()
    for mig in range(10_000 if KIND != 'ops' else 0):
        os.mkdir('%s/dst%d' % (dst, mig))
        one(where, mig, at, dst, w, log)
    rng = random.Random(int(os.environ.get('SEED', '1')))
    disk = os.open(dst, os.O_RDONLY)
    for mig in range(10_000):
        root = '%s/dst%d' % (dst, mig)
        os.mkdir(root)
        background = mig % 3 == 2
        w.mount = mount(where + '/src', where, root, at, background)
        fd, size = os.open(at + '/f', os.O_RDWR), SIZE
        for k in range(OPS):
            op = choose(rng, size)
            if op[0] == 'kill' and background:
                op[0] = 'read'
            log.write(json.dumps([mig, k, op]) + '\n')
            log.flush()
            if op[0] == 'kill':
                os.close(fd)
                w.mount.kill()
                w.mount.stop()
                w.mount = mount(where + '/src', where, root, at, background)
                fd = os.open(at + '/f', os.O_RDWR)
            do(at + '/f', fd, op, disk)
            size = os.fstat(fd).st_size
            if op[0] in SYNCS:
                w.promise(mig, k)
            time.sleep(rng.choice([0, 0, 0.002, 0.02]))
        os.close(fd)
        w.mount.stop()
        w.mount = None


def check(where):
    dst, at = os.environ['DST'], where + '/check'
    os.makedirs(at, exist_ok=True)
    acked, ops = lab.latest((int(w[0]), w[1]) for w in lab.promised() if len(w) == 2), {}
    for line in open(where + '/ops'):
        if line.endswith('\n'):
            mig, k, op = json.loads(line)
            ops.setdefault(mig, []).append(op)
    there = lab.migrations(dst)
    bad = ['dst%d is gone' % mig for mig in acked if mig not in there]
    for mig in there[-3:]:
        root, last = '%s/dst%d' % (dst, mig), acked.get(mig, -1)
        versions, all_ = [], original()
        if last < 0:
            versions.append(all_)
        for k, op in enumerate(ops.get(mig, [])):
            all_ = apply(all_, op)
            if k >= last:
                versions.append(all_)
        src = src_of(where, mig)
        if KIND == 'grow':
            if not os.path.exists(src + '/f'):
                continue
            with open(src + '/f', 'r+b') as f:
                f.write(original())
        m = lab.Mount(src, root, at, where + '/check-log', LARGE)
        try:
            bad += unlike(lab.read(at + '/f'), versions, 'dst%d after the cut (op %d)' % (mig, last))
            m.finish()
        except (RuntimeError, OSError) as e:
            bad.append('dst%d: %s' % (mig, e))
        finally:
            m.stop()
        bad += unlike(lab.read(root + '/f'), versions, 'dst%d after finish (op %d)' % (mig, last))
        bad += ['trace: ' + t for t in lab.traces(root)]
    print('\n'.join(bad[:15]))
    return 1 if bad else 0


def unlike(got, versions, what):
    sizes = [len(v) for v in versions]
    if len(got) not in sizes and not min(sizes) < len(got) < max(sizes):
        return ['%s: %d bytes, should be one of %s' % (what, len(got), sorted(set(sizes)))]
    src = original()
    for a in range(0, len(got), 512):
        b = got[a:a + 512]
        if any(b == v[a:a + 512] for v in versions):
            continue
        for i, c in enumerate(b):
            # An append that nobody synced may be there as zeros, on ext4 itself too.
            zeros = 0 if KIND == 'ops' else -1
            if not any(c == (v[a + i] if a + i < len(v) else zeros) for v in versions):
                kind = 'src\'s bytes' if b == src[a:a + 512] else 'zeros' if not any(b) else 'other bytes'
                return ['%s: %s at %d of %d' % (what, kind, a + i, len(got))]
    return []


if __name__ == '__main__':
    lab.main(__doc__, prepare, write, check)
