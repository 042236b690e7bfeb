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

SIZE, OPS = 1_500_001, 60
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


def mount(where, root, at, background):
    args = LARGE if background else LARGE + ['--no-background']
    m = lab.Mount(where + '/src', root, at, where + '/log', args)
    if not background:
        lab.ask('pause', at)
    return m


def write(where):
    dst, at = os.environ['DST'], where + '/mnt'
    os.makedirs(at, exist_ok=True)
    log, w = open(where + '/ops', 'w'), lab.Writer()
    rng = random.Random(int(os.environ.get('SEED', '1')))
    disk = os.open(dst, os.O_RDONLY)
    for mig in range(10_000):
        root = '%s/dst%d' % (dst, mig)
        os.mkdir(root)
        background = mig % 3 == 2
        w.mount = mount(where, root, at, background)
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
                w.mount = mount(where, root, at, background)
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
        m = lab.Mount(where + '/src', root, at, where + '/check-log', LARGE)
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
            if not any(c == (v[a + i] if a + i < len(v) else 0) for v in versions):
                kind = 'src\'s bytes' if b == src[a:a + 512] else 'zeros' if not any(b) else 'other bytes'
                return ['%s: %s at %d of %d' % (what, kind, a + i, len(got))]
    return []


if __name__ == '__main__':
    if len(sys.argv) != 3 or sys.argv[1] not in ('prepare', 'write', 'check'):
        lab.die(__doc__)
    sys.exit({'prepare': prepare, 'write': write, 'check': check}[sys.argv[1]](sys.argv[2]))
