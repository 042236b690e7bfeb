#!/usr/bin/env python3
"""fsx_pending.py: what fsx does, on files that start pending. As root.

  fsx_pending.py [--fs ext4|xfs|btrfs|dir] [--ops 100000] [--seed N] [--control]

fsx truncates its file first, so it never meets one that is still to be pulled. This takes a file of a new src every
few hundred operations (some small, some large enough to be opened before they are whole, some with holes) and does
random reads, writes, appends, truncations, shared mappings, fallocates, hole punches, copies, syncs and reopens on it
through the mount, and on a model in memory. Then finishes and compares dst. Then runs fsx, where it is installed.
"""
import argparse
import ctypes
import errno
import mmap
import os
import random
import shutil
import subprocess
import sys
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'crash'))
import lab

EACH = 400                  # operations on one file
SIZE_MAX = 12 << 20
KEEP, PUNCH, ZERO = 1, 2, 16
lab.libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def make(src, count, rng):
    """count files; -> their contents, made again when they are needed."""
    for i in range(count):
        with open('%s/f%d' % (src, i), 'wb') as f:
            kind = i % 5
            if kind == 4:                                   # holes, large
                f.truncate(9_500_000)
                for k in range(6):
                    f.seek(rng.randrange(9_000_000))
                    f.write(rng.randbytes(rng.randrange(200_000)))
            else:
                f.write(rng.randbytes([rng.randrange(5000), 65_536, rng.randrange(1 << 20), 8_400_000 + rng.randrange(1 << 20)][kind]))
        os.utime('%s/f%d' % (src, i), ns=(lab.T0, lab.T0 + i))


class Fsx:
    def __init__(self, at, src, rng, say):
        self.at, self.src, self.rng, self.say = at, src, rng, say
        self.other = None
        self.count = {}

    def start(self, i):
        self.path = '%s/f%d' % (self.at, i)
        self.data = bytearray(lab.read('%s/f%d' % (self.src, i)))
        self.log = []
        self.fd = os.open(self.path, os.O_RDWR)

    def end(self):
        os.close(self.fd)
        got = lab.read(self.path)
        self.same(got, self.data, 0, 'the whole file')

    def span(self, limit=256 << 10):
        """A place and a length, inside the file as it is."""
        size = len(self.data)
        if not size:
            return 0, 0
        off = self.rng.randrange(size)
        return off, min(size - off, self.rng.randrange(1, limit))

    def same(self, got, want, off, what):
        if bytes(got) != bytes(want):
            if len(got) == len(want):
                at = next(k for k in range(len(got)) if got[k] != want[k])
                what += ': first wrong byte at %d, %r for %r' % (off + at, bytes(got[at:at + 8]), bytes(want[at:at + 8]))
            else:
                what += ': %d bytes for %d' % (len(got), len(want))
            self.say('%s: %s; before it: %s' % (self.path, what, '; '.join(self.log[-12:])))
            raise Stop

    def op(self):
        rng = self.rng
        name = rng.choices(['read', 'write', 'append', 'truncate', 'mapread', 'mapwrite', 'allocate', 'punch', 'zero',
                            'copy', 'fsync', 'reopen', 'stat', 'sendfile', 'seek'],
                           [14, 14, 3, 4, 8, 8, 3, 4, 2, 6, 1, 3, 2, 2, 3])[0]
        self.count[name] = self.count.get(name, 0) + 1
        getattr(self, name)()

    def note(self, text, *args):
        self.log.append(text % args)

    def read(self):
        off, n = self.span()
        self.note('read %d+%d', off, n)
        self.same(os.pread(self.fd, n, off), self.data[off:off + n], off, 'read %d+%d' % (off, n))

    def put(self, off, b):
        if off > len(self.data):
            self.data.extend(bytes(off - len(self.data)))
        self.data[off:off + len(b)] = b

    def write(self):
        off, n = self.rng.randrange(min(SIZE_MAX, len(self.data) + 70_000) + 1), self.rng.choice([1, 500, 4096, 70_000, 200_000])
        b = self.rng.randbytes(n)
        self.note('write %d+%d', off, n)
        done = os.pwrite(self.fd, b, off)
        self.put(off, b[:done])
        if done != n:
            self.say('%s: wrote %d of %d' % (self.path, done, n))

    def append(self):
        b = self.rng.randbytes(self.rng.choice([1, 100, 5000]))
        self.note('append %d', len(b))
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, b)
        finally:
            os.close(fd)
        self.put(len(self.data), b)

    def truncate(self):
        n = self.rng.choice([0, self.rng.randrange(len(self.data) + 1), min(SIZE_MAX, len(self.data) + self.rng.randrange(300_000))])
        if n == 0 and self.rng.random() < 0.6:
            n = len(self.data) // 2
        self.note('truncate %d', n)
        os.ftruncate(self.fd, n) if self.rng.random() < 0.5 else os.truncate(self.path, n)
        self.data[:] = self.data[:n].ljust(n, b'\0')

    def mapread(self):
        off, n = self.span()
        if not n:
            return
        self.note('mapread %d+%d', off, n)
        base = off & ~4095
        with mmap.mmap(self.fd, off + n - base, mmap.MAP_SHARED, mmap.PROT_READ, offset=base) as m:
            self.same(m[off - base:], self.data[off:off + n], off, 'mapread %d+%d' % (off, n))

    def mapwrite(self):
        off, n = self.span(100_000)
        if not n:
            return
        self.note('mapwrite %d+%d', off, n)
        b = self.rng.randbytes(n)
        base = off & ~4095
        with mmap.mmap(self.fd, off + n - base, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=base) as m:
            m[off - base:] = b
            if self.rng.random() < 0.7:
                m.flush()
        self.data[off:off + n] = b

    def fallocate(self, mode, off, n):
        if lab.libc.fallocate(self.fd, mode, off, n):
            e = ctypes.get_errno()
            if e != errno.EOPNOTSUPP:
                raise OSError(e, os.strerror(e))
            return False
        return True

    def allocate(self):
        off, n = self.rng.randrange(len(self.data) + 1), self.rng.randrange(1, 200_000)
        keep = self.rng.random() < 0.3
        self.note('allocate %d+%d keep %d', off, n, keep)
        if self.fallocate(KEEP if keep else 0, off, n) and not keep and off + n > len(self.data):
            self.data.extend(bytes(off + n - len(self.data)))

    def punch(self):
        off, n = self.span()
        if n:
            self.note('punch %d+%d', off, n)
            if self.fallocate(PUNCH | KEEP, off, n):
                self.data[off:off + n] = bytes(n)

    def zero(self):
        off, n = self.span()
        if n:
            self.note('zero %d+%d', off, n)
            if self.fallocate(ZERO, off, n):
                self.data[off:off + n] = bytes(n)

    def copy(self):
        off, n = self.span()
        to = self.rng.randrange(len(self.data) + 1)
        if not n or abs(to - off) < n or to + n > SIZE_MAX:
            return
        self.note('copy %d+%d to %d', off, n, to)
        done = 0
        while done < n:
            k = os.copy_file_range(self.fd, self.fd, n - done, off + done, to + done)
            if not k:
                break
            done += k
        self.put(to, bytes(self.data[off:off + done]))
        if done != n:
            self.say('%s: copied %d of %d' % (self.path, done, n))

    def fsync(self):
        self.note('fsync')
        (os.fsync if self.rng.random() < 0.5 else os.fdatasync)(self.fd)

    def reopen(self):
        self.note('reopen')
        if self.rng.random() < 0.5:
            os.close(self.fd)
            self.fd = os.open(self.path, os.O_RDWR)
        else:
            fd = os.open(self.path, os.O_RDWR)      # before the other is closed: one io mode for both
            os.close(self.fd)
            self.fd = fd

    def stat(self):
        size = os.stat(self.path).st_size if self.rng.random() < 0.5 else os.fstat(self.fd).st_size
        if size != len(self.data):
            self.say('%s: size %d for %d; before it: %s' % (self.path, size, len(self.data), '; '.join(self.log[-12:])))
            raise Stop

    def sendfile(self):
        off, n = self.span(60_000)
        r, w = os.pipe()
        try:
            n = os.sendfile(w, self.fd, off, n) if n else 0
            self.note('sendfile %d+%d', off, n)
            got = os.read(r, n) if n else b''
        finally:
            os.close(r)
            os.close(w)
        self.same(got, self.data[off:off + len(got)], off, 'sendfile')

    def seek(self):
        """What SEEK_HOLE calls a hole reads as zeros."""
        off, n = self.span()
        if not n:
            return
        self.note('seek %d', off)
        try:
            data = os.lseek(self.fd, off, os.SEEK_DATA)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            data = len(self.data)
        if any(self.data[off:data]):
            self.say('%s: SEEK_DATA from %d says %d, and there is data between; before it: %s' % (self.path, off, data, '; '.join(self.log[-12:])))
            raise Stop


class Stop(Exception):
    pass


def real_fsx(at, ops, seed, bad):
    tool = os.environ.get('FSX') or shutil.which('fsx') or os.path.expanduser('~/.cargo/bin/fsx')
    if not os.path.exists(tool):
        print('fsx itself not run: cargo install fsx --version 0.3.2')
        if os.environ.get('MIRRORFS_TEST_ALL') == '1':
            bad.append('no fsx')
        return
    conf = os.path.dirname(at) + '/fsx.toml'
    with open(conf, 'w') as f:
        f.write('flen = 4194304\n[opsize]\nmax = 262144\nmin = 0\nalign = 1\n[weights]\nclose_open = 2\nread = 10\nwrite = 10\n'
                'mapread = 8\nmapwrite = 8\ninvalidate = 1\ntruncate = 4\nfsync = 0.3\nfdatasync = 0.3\nposix_fallocate = 2\n'
                'punch_hole = 4\nsendfile = 4\nposix_fadvise = 2\ncopy_file_range = 6\n')
    p = subprocess.run([tool, '-f', conf, '-N', str(ops), '-S', str(seed), '-P', os.path.dirname(at), at + '/fsx-file'],
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace', timeout=1200)
    print('fsx: %d operations, exit %d' % (ops, p.returncode))
    if p.returncode:
        bad.append('fsx: ' + p.stdout[-1500:])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--fs', default='ext4', choices=('ext4', 'xfs', 'btrfs', 'dir'))
    ap.add_argument('--ops', type=int, default=100_000)
    ap.add_argument('--seed', type=int, default=1)
    ap.add_argument('--control', action='store_true', help='without the program: tests this script')
    o = ap.parse_args()
    lab.own_namespace()
    work = lab.scratch('mirrorfs-fsx.')
    bad = []

    def say(text):
        bad.append(text)
        print('VIOLATION ' + text, flush=True)
    t, rng, mount = time.time(), random.Random(o.seed), None
    done = files = 0
    counts = {}
    try:
        fs = lab.make_fs(o.fs, work, 8 << 30)
        at = work + '/mnt'
        os.mkdir(at)
        batch = 0
        while done < o.ops and len(bad) < 5:
            src, dst = fs + '/src%d' % batch, fs + '/dst%d' % batch
            os.mkdir(src)
            os.mkdir(dst)
            n = min(60, -(-(o.ops - done) // EACH))
            make(src, n, rng)
            if o.control:
                subprocess.run(['cp', '-a', src + '/.', dst], check=True)
                subprocess.run(['mount', '--bind', dst, at], check=True)
            else:
                # Without the walker every file is still pending when its turn comes.
                mount = lab.Mount(src, dst, at, work + '/log', ['--no-background'])
            f = Fsx(at, src, rng, say)
            want = {}
            for i in range(n):
                f.start(i)
                try:
                    for _ in range(min(EACH, o.ops - done)):
                        f.op()
                        done += 1
                    f.end()
                except Stop:
                    os.close(f.fd)
                want[i] = bytes(f.data)
                files += 1
            for k, v in f.count.items():
                counts[k] = counts.get(k, 0) + v
            if batch == 0:
                real_fsx(at, o.ops // 5, o.seed, bad)
            if o.control:
                subprocess.run(['umount', at], check=True)
            elif not bad:
                if os.path.exists(at + '/fsx-file'):
                    os.unlink(at + '/fsx-file')
                mount.finish()
            for i, b in want.items():
                if not bad and lab.read('%s/f%d' % (dst, i)) != b:
                    say('after finish: f%d differs' % i)
            if mount:
                mount.stop()
            shutil.rmtree(src)
            shutil.rmtree(dst)
            batch += 1
    except Exception:
        import traceback
        traceback.print_exc()
        bad.append('stopped')
    finally:
        if mount:
            mount.stop()
            if bad:
                print('log of the mount:\n' + mount.tail())
        lab.remove(work)
    print('%s: %d operations (%s) on %d files that started pending, seed %d, %.0f s: %d violations' % (
        o.fs, done, ', '.join('%s %d' % kv for kv in sorted(counts.items())), files, o.seed, time.time() - t, len(bad)))
    sys.exit(1 if bad else 0)


if __name__ == '__main__':
    main()
