#!/usr/bin/env python3
"""kill9.py: kill -9 at random moments under a random workload. As root.

  kill9.py [--rounds 100] [--fs ext4|xfs|btrfs|dir] [--seed N] [--transport dev|uring] [--keep-mount] [--control]

Each round mounts (over the dead mount of the round before), lets three threads read, write, rename and
delete, and kills the daemon with SIGKILL at a random moment, sometimes while it starts. What had returned
before must be there after the next mount: no write lost, nothing deleted back, no wrong byte. What was in
flight may have happened or not. Every few rounds the migration is finished and the whole of dst compared with
the model. --keep-mount kills the daemon several times in a round, also while it takes over: no operation may fail,
until its keeper is killed too. --control does the same without the program (a copy of src, bind-mounted): it tests this script.
Exit 0: no violation.
"""
import argparse
import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import lab

THREADS = 3
FILES = 220


class Node:
    """One inode of the model. None means: not known any more, or as src has it by a chain of our own."""

    def __init__(self, kind, data=None, mode=0o644, target=None, mtime=None, xattrs=None):
        self.kind, self.data, self.mode, self.target = kind, data, mode, target
        self.mtime, self.xattrs = mtime, dict(xattrs or {})
        self.synced = True


class Model:
    """Names of one thread's subtree -> Node, and the operation that is in flight."""

    def __init__(self, top, src, rng):
        self.top, self.rng = top, rng
        self.names = {}
        self.gone = set()
        self.flight_ = None
        self.log = []           # all that was begun, for the story of a violation
        inodes = {}
        for rel in [top] + [top + '/' + n for n in lab.tree(src + '/' + top)]:
            l = lab.look(src + '/' + rel)
            n = inodes.get(l['ino']) if l['kind'] != stat.S_IFDIR else None
            if n is None:
                n = inodes[l['ino']] = Node(l['kind'], None, l['mode'], l['target'], l['mtime'], l['xattrs'])
                if n.kind == stat.S_IFREG:
                    n.data = lab.read(src + '/' + rel)
            self.names[rel] = n

    @property
    def flight(self):
        return self.flight_

    @flight.setter
    def flight(self, op):
        self.flight_ = op
        if op:
            self.log.append([x if not isinstance(x, bytes) else len(x) for x in op])

    def story(self, path):
        """What was done to a name, and the kills between."""
        return '; '.join(str(op) for op in self.log if op == ['kill'] or any(isinstance(x, str) and (
            x == path or path.startswith(x + '/')) for x in op[1:]))[-600:]

    def pick(self, kind):
        all_ = [p for p, n in self.names.items() if n.kind == kind and p != self.top]
        return self.rng.choice(all_) if all_ else None

    def new_name(self):
        dirs = [p for p, n in self.names.items() if n.kind == stat.S_IFDIR]
        while True:
            p = '%s/n%d' % (self.rng.choice(dirs), self.rng.randrange(10**6))
            if p not in self.names:
                return p

    def touched_dir(self, path):
        self.names[os.path.dirname(path)].mtime = None

    def drop(self, path):
        self.touched_dir(path)
        del self.names[path]
        self.gone.add(path)

    def add(self, path, node):
        self.touched_dir(path)
        self.names[path] = node
        self.gone.discard(path)

    def move(self, a, b):
        self.touched_dir(a)
        self.touched_dir(b)
        for p in [p for p in self.names if p == a or p.startswith(a + '/')]:
            self.names[b + p[len(a):]] = self.names.pop(p)
            self.gone.add(p)
            self.gone.discard(b + p[len(a):])


class Violation(Exception):
    pass


class Lab:
    def __init__(self, o):
        self.o = o
        self.rng = random.Random(o.seed)
        self.work = lab.scratch('mirrorfs-kill9.')
        os.environ['MIRRORFS_RUN_DIR'] = os.environ['MIRRORFS_STATE_DIR'] = self.work + '/run'
        self.fs = lab.make_fs(o.fs, self.work)
        self.at = self.work + '/mnt'
        os.mkdir(self.at)
        self.log = self.work + '/log'
        self.mount = None
        # All is about to be killed; it was.
        self.dying, self.killed = threading.Event(), threading.Event()
        self.bad = []
        self.n = dict(kills=0, kills_at_start=0, kills_kept=0, finished=0, ops=0, reads=0, writes=0, fsyncs=0, deletes=0, renames=0,
                      in_flight=0, write_checks=0, delete_checks=0, entries_compared=0)
        self.beat = time.monotonic()
        threading.Thread(target=self.watchdog, daemon=True).start()

    def watchdog(self):
        while True:
            time.sleep(1)
            if time.monotonic() - self.beat > 150 and self.mount:
                self.bad.append('hang: nothing moved for 150 s')
                self.mount.proc.kill()
                self.beat = time.monotonic()

    def say(self, text):
        self.bad.append(text)
        print('VIOLATION ' + text, flush=True)

    # ---- one migration, several kills
    def epoch(self, number, rounds):
        self.src, self.dst = self.fs + '/src', self.fs + '/dst'
        for d in (self.src, self.dst):
            shutil.rmtree(d, ignore_errors=True)
            os.mkdir(d)
        lab.fill_src(self.src, '%d-%d' % (self.o.seed, number), THREADS, FILES)
        if self.o.control:
            subprocess.run(['cp', '-a', self.src + '/.', self.dst], check=True)
        self.models = [Model('t%d' % i, self.src, random.Random('%d-%d-%d' % (self.o.seed, number, i)))
                       for i in range(THREADS)]
        for _ in range(rounds):
            self.beat = time.monotonic()
            self.round()
        self.beat = time.monotonic()
        self.start([])
        self.check_known()
        if not self.o.control:
            self.mount.finish()
        self.stop()
        self.compare_all()
        self.n['finished'] += 1

    def start(self, args):
        self.dying.clear()
        self.killed.clear()
        if self.o.control:
            subprocess.run(['mount', '--bind', self.dst, self.at], check=True)
            return
        self.mount = self.make(args)

    def make(self, args, wait=60):
        kind = lab.Kept if self.o.keep_mount else lab.Mount
        return kind(self.src, self.dst, self.at, self.log, ['--transport', self.o.transport, *args], wait)

    def stop(self):
        if self.o.control:
            subprocess.run(['umount', self.at], check=True)
        elif self.mount:
            self.mount.stop()

    def round(self):
        rng = self.rng
        if not self.o.control and rng.random() < 0.1:
            # Killed while it starts: nothing is in flight.
            m = self.make([], wait=0)
            time.sleep(rng.random() * 0.08)
            m.kill()
            self.n['kills_at_start'] += 1
            self.n['kills'] += 1
        self.start(rng.choice([[], [], ['--no-background']]))
        if rng.random() < 0.7:
            self.check_known()
        else:
            for m in self.models:
                self.settle(m)
        threads = [threading.Thread(target=self.worker, args=(m,)) for m in self.models]
        for t in threads:
            t.start()
        for _ in range(rng.randrange(6) if self.o.keep_mount else 0):
            time.sleep(rng.choice([0, 0.02, 0.1, 0.3]) * (0.3 + rng.random()))
            if not self.mount.kill_daemon():
                self.say('the keeper has ended: ' + self.mount.tail())
            self.n['kills_kept'] += 1
            for m in self.models:
                m.log.append(['kill'])
        time.sleep(rng.choice([0.02, 0.1, 0.3, 0.6, 1.2]) * (0.3 + rng.random()))
        if not self.o.control:
            self.dying.set()
            self.mount.kill()
        self.killed.set()
        for t in threads:
            t.join()
        if self.o.control:
            self.stop()
        self.n['kills'] += 1
        for m in self.models:
            m.log.append(['kill'])

    def worker(self, m):
        while not self.killed.is_set():
            m.flight = None
            self.beat = time.monotonic()
            try:
                self.op(m)
                self.n['ops'] += 1
            except OSError as e:
                if self.excused(e):
                    return
                self.say('%s: %s: %s' % (m.flight and m.flight[0], e, m.flight and m.story(m.flight[1])))
                return
            except Violation as e:
                self.say(str(e))
                return
        m.flight = None

    def excused(self, e):
        """The daemon was killed for good; it is dead a moment before that is told."""
        return e.errno in lab.DEAD and self.dying.is_set() and self.killed.wait(10)

    def p(self, path):
        return self.at + '/' + path

    def op(self, m):
        rng = m.rng
        what = rng.choices(['read', 'pread', 'write', 'append', 'create', 'truncate', 'unlink', 'rename', 'rename_dir', 'mkdir',
                            'rmdir', 'link', 'symlink', 'chmod', 'setxattr', 'utime', 'list'],
                           [20, 6, 20, 6, 8, 6, 8, 8, 1, 2, 1, 3, 2, 4, 3, 3, 6])[0]
        getattr(self, 'op_' + what)(m)

    def op_read(self, m):
        p = m.pick(stat.S_IFREG)
        if p is None:
            return
        got = lab.read(self.p(p))
        self.n['reads'] += 1
        if got != m.names[p].data:
            raise Violation('read of %s: %s' % (p, differ(got, m.names[p].data)))

    def op_pread(self, m):
        p = m.pick(stat.S_IFREG)
        if p is None:
            return
        n = m.names[p]
        off = m.rng.randrange(len(n.data) + 1)
        with open(self.p(p), 'rb', buffering=0) as f:
            got = os.pread(f.fileno(), 5000, off)
        self.n['reads'] += 1
        if got != n.data[off:off + 5000]:
            raise Violation('pread of %s at %d: wrong bytes' % (p, off))

    def write_at(self, m, p, off, b, flags=0):
        n = m.names[p]
        sync = m.rng.random() < 0.4
        old = n.data
        new = old[:off].ljust(off, b'\0') + b + old[off + len(b):]
        fd = os.open(self.p(p), os.O_RDWR | flags)
        try:
            m.flight = ('write', p, old, new)
            done = os.pwrite(fd, b, off)
            if done != len(b):
                raise Violation('write of %d to %s wrote %d' % (len(b), p, done))
            n.data, n.mtime, n.synced = new, None, False
            m.flight = None
            self.n['writes'] += 1
            if sync:
                os.fsync(fd)
                n.synced = True
                self.n['fsyncs'] += 1
        finally:
            os.close(fd)

    def op_write(self, m):
        p = m.pick(stat.S_IFREG)
        if p is None:
            return
        n = m.names[p]
        off = m.rng.randrange(len(n.data) + 1)
        self.write_at(m, p, off, lab.data(m.rng.random(), m.rng.choice([1, 100, 4096, 30000])))

    def op_append(self, m):
        p = m.pick(stat.S_IFREG)
        if p is not None:
            b = lab.data(m.rng.random(), m.rng.choice([1, 100, 4096]))
            self.write_at(m, p, len(m.names[p].data), b, os.O_APPEND)

    def op_create(self, m):
        p = m.new_name()
        mode = m.rng.choice([0o644, 0o600, 0o666])
        m.flight = ('create', p, mode)
        os.close(os.open(self.p(p), os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        m.add(p, Node(stat.S_IFREG, b'', mode))
        m.flight = None
        self.write_at(m, p, 0, lab.data(m.rng.random(), m.rng.choice([0, 10, 5000, 100000])))

    def op_truncate(self, m):
        p = m.pick(stat.S_IFREG)
        if p is None:
            return
        n = m.names[p]
        size = m.rng.choice([0, 0, m.rng.randrange(len(n.data) + 1), len(n.data) + m.rng.randrange(9000)])
        new = n.data[:size].ljust(size, b'\0')
        m.flight = ('write', p, n.data, new)
        if size == 0 and m.rng.random() < 0.5:
            os.close(os.open(self.p(p), os.O_WRONLY | os.O_TRUNC))
        else:
            os.truncate(self.p(p), size)
        n.data, n.mtime, n.synced = new, None, False
        self.n['writes'] += 1

    def op_unlink(self, m):
        p = m.pick(m.rng.choice([stat.S_IFREG, stat.S_IFREG, stat.S_IFLNK]))
        if p is None:
            return
        m.flight = ('unlink', p)
        os.unlink(self.p(p))
        m.drop(p)
        self.n['deletes'] += 1

    def op_rename(self, m):
        a = m.pick(m.rng.choice([stat.S_IFREG, stat.S_IFREG, stat.S_IFLNK]))
        if a is None:
            return
        b = m.new_name()
        if m.rng.random() < 0.3:
            b = m.pick(stat.S_IFREG) or b
        if m.names.get(b) is m.names[a]:
            return
        m.flight = ('rename', a, b)
        os.rename(self.p(a), self.p(b))
        m.move(a, b)
        self.n['renames'] += 1

    def op_rename_dir(self, m):
        a, b = m.pick(stat.S_IFDIR), m.new_name()
        if a is None or b.startswith(a + '/'):
            return
        m.flight = ('rename', a, b)
        os.rename(self.p(a), self.p(b))
        m.move(a, b)
        self.n['renames'] += 1

    def op_mkdir(self, m):
        p = m.new_name()
        m.flight = ('mkdir', p)
        os.mkdir(self.p(p), 0o755)
        m.add(p, Node(stat.S_IFDIR, mode=0o755))

    def op_rmdir(self, m):
        p = m.pick(stat.S_IFDIR)
        if p is None:
            return
        full = any(q.startswith(p + '/') for q in m.names)
        m.flight = ('unlink', p)
        try:
            os.rmdir(self.p(p))
        except OSError as e:
            if full and e.errno == errno.ENOTEMPTY:
                m.flight = None
                return
            raise
        if full:
            raise Violation('rmdir of %s worked, and it was not empty' % p)
        m.drop(p)
        self.n['deletes'] += 1

    def op_link(self, m):
        a, b = m.pick(stat.S_IFREG), m.new_name()
        if a is None:
            return
        m.flight = ('link', a, b)
        os.link(self.p(a), self.p(b))
        m.add(b, m.names[a])

    def op_symlink(self, m):
        p = m.new_name()
        m.flight = ('symlink', p)
        os.symlink('to ' + p, self.p(p))
        m.add(p, Node(stat.S_IFLNK, mode=0o777, target='to ' + p))

    def op_chmod(self, m):
        p = m.pick(stat.S_IFREG)
        if p is None:
            return
        mode = m.rng.choice([0o600, 0o644, 0o755, 0o400, 0o711])
        m.flight = ('attr', p, 'mode', mode)
        os.chmod(self.p(p), mode)
        m.names[p].mode = mode

    def op_setxattr(self, m):
        p = m.pick(stat.S_IFREG)
        if p is None:
            return
        xs = dict(m.names[p].xattrs)
        xs['user.mine'] = b'%d' % m.rng.randrange(1000)
        m.flight = ('attr', p, 'xattrs', xs)
        os.setxattr(self.p(p), 'user.mine', xs['user.mine'])
        m.names[p].xattrs = xs

    def op_utime(self, m):
        p = m.pick(stat.S_IFREG)
        if p is None:
            return
        t = m.rng.randrange(2 * 10**18)
        m.flight = ('attr', p, 'mtime', t)
        os.utime(self.p(p), ns=(t, t))
        m.names[p].mtime = t

    def op_list(self, m):
        d = m.pick(stat.S_IFDIR)
        if d is None:
            return
        want = sorted(os.path.basename(p) for p in m.names if os.path.dirname(p) == d)
        got = sorted(os.listdir(self.p(d)))
        if got != want:
            raise Violation('list of %s: missing %s, extra %s' % (d, sorted(set(want) - set(got))[:5], sorted(set(got) - set(want))[:5]))

    # ---- after a kill
    def check_known(self):
        """Settles what was in flight, then checks what was written and deleted, through the mount."""
        for m in self.models:
            self.settle(m)
            paths = [p for p, n in m.names.items() if n.kind == stat.S_IFREG and n.mtime is None]
            for p in m.rng.sample(paths, min(40, len(paths))):
                self.n['write_checks'] += 1
                n = m.names[p]
                try:
                    got = lab.read(self.p(p))
                except OSError as e:
                    self.say('after a kill: %s (%s): %s' % (p, 'fsynced' if n.synced else 'written', e.strerror))
                    continue
                if got != n.data:
                    self.say('after a kill: %s (%s): %s' % (p, 'fsynced' if n.synced else 'written', differ(got, n.data)))
                    n.data = got
            for p in m.gone:
                self.n['delete_checks'] += 1
                if os.path.lexists(self.p(p)):
                    self.say('after a kill: %s came back: %s' % (p, m.story(p)))

    def settle(self, m):
        """What was in flight has happened or not: the model takes over which."""
        f, m.flight = m.flight, None
        if not f:
            return
        self.n['in_flight'] += 1
        kind, p = f[0], f[1]
        there = os.path.lexists(self.p(p))
        if kind == 'write':
            old, new = f[2], f[3]
            got = lab.read(self.p(p))
            ok = len(got) in (len(old), len(new)) or min(len(old), len(new)) <= len(got) <= max(len(old), len(new))
            for i in range(0, len(got), 512):
                g = got[i:i + 512]
                if g == old[i:i + 512] or g == new[i:i + 512]:
                    continue
                # The block where the cut is: each byte must be one of the two, or zero past the old end.
                for j, c in enumerate(g, i):
                    if c not in (old[j] if j < len(old) else 0, new[j] if j < len(new) else 0):
                        ok = False
            if not ok:
                self.say('write in flight: %s is neither old nor new (%d bytes; %d, %d)' % (p, len(got), len(old), len(new)))
            m.names[p].data, m.names[p].mtime = got, None
        elif kind == 'create' and there:
            m.add(p, Node(stat.S_IFREG, b'', f[2]))
        elif kind == 'unlink':
            m.drop(p) if not there else m.touched_dir(p)
        elif kind == 'rename':
            if not there:
                m.move(p, f[2])
            m.touched_dir(p if p in m.names else f[2])
        elif kind == 'mkdir' and there:
            m.add(p, Node(stat.S_IFDIR, mode=0o755))
        elif kind == 'symlink' and there:
            m.add(p, Node(stat.S_IFLNK, mode=0o777, target='to ' + p))
        elif kind == 'link' and os.path.lexists(self.p(f[2])):
            m.add(f[2], m.names[p])
        elif kind == 'attr':
            l = lab.look(self.p(p))
            if l[f[2]] not in (f[3], getattr(m.names[p], f[2])) and getattr(m.names[p], f[2]) is not None:
                self.say('%s in flight: %s has %r' % (f[2], p, l[f[2]]))
            setattr(m.names[p], f[2], l[f[2]])
        if kind in ('create', 'mkdir', 'symlink', 'link'):
            m.touched_dir(f[2] if kind == 'link' else p)

    def story(self, path):
        return next(m.story(path) for m in self.models if m.top == path.split('/')[0])

    def compare_all(self):
        """The whole of dst, raw, with the model."""
        for t in lab.traces(self.dst):
            self.say('trace after finish: ' + t)
        want = {}
        for m in self.models:
            want.update(m.names)
        got = lab.tree(self.dst)
        for p in sorted(set(want) - set(got)):
            self.say('after finish: %s is missing: %s' % (p, self.story(p)))
        for p in sorted(set(got) - set(want)):
            self.say('after finish: %s should not be there: %s' % (p, self.story(p)))
        inodes = {}
        for p in sorted(set(want) & set(got)):
            n, l = want[p], lab.look(self.dst + '/' + p)
            self.n['entries_compared'] += 1
            for k, a, b in (('kind', n.kind, l['kind']), ('mode', n.mode, l['mode']), ('target', n.target, l['target']),
                            ('xattrs', n.xattrs, l['xattrs']), ('mtime', n.mtime, l['mtime'])):
                if a != b and not (k == 'mtime' and a is None):
                    self.say('after finish: %s: %s: %r, should be %r: %s' % (p, k, b, a, self.story(p)))
            if n.kind != stat.S_IFDIR and inodes.setdefault(id(n), l['ino']) != l['ino']:
                self.say('after finish: %s is not linked with its other names' % p)
            if n.kind == stat.S_IFREG:
                b = lab.read(self.dst + '/' + p)
                if b != n.data:
                    self.say('after finish: %s: %s: %s' % (p, differ(b, n.data), self.story(p)))
        if len(set(inodes.values())) != len(inodes):
            self.say('after finish: names are linked that should not be')


def differ(got, want):
    if len(got) != len(want):
        return '%d bytes, should be %d' % (len(got), len(want))
    at = next(i for i in range(len(got)) if got[i] != want[i])
    wrong = sum(a != b for a, b in zip(got, want))
    return '%d wrong bytes from %d on%s' % (wrong, at, ', zeros' if not any(got[at:at + 512]) else '')


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--rounds', type=int, default=100)
    ap.add_argument('--fs', default='ext4', choices=('ext4', 'xfs', 'btrfs', 'dir'))
    ap.add_argument('--seed', type=int, default=1)
    ap.add_argument('--transport', default='dev', choices=('dev', 'uring'))
    ap.add_argument('--keep-mount', action='store_true')
    ap.add_argument('--control', action='store_true')
    ap.add_argument('--keep', action='store_true', help='leave the scratch directory when there was a violation')
    o = ap.parse_args()
    os.umask(0)
    lab.own_namespace()
    t = time.time()
    l = Lab(o)
    try:
        number = 0
        while l.n['kills'] < o.rounds and len(l.bad) < 30:
            l.epoch(number, min(8, o.rounds - l.n['kills']))
            number += 1
    except Exception as e:
        import traceback
        traceback.print_exc()
        l.bad.append('%s: %s' % (type(e).__name__, e))
    finally:
        if l.mount:
            l.mount.stop()
            if l.bad:
                print('log of the mount:\n' + l.mount.tail())
        if not (l.bad and o.keep):
            lab.remove(l.work)
    how = o.fs + (', uring' if o.transport == 'uring' else '') + (', kept' if o.keep_mount else '')
    print('%s: %s, seed %d, %.0f s: %d violations' % (how, ', '.join('%s %d' % kv for kv in l.n.items()), o.seed, time.time() - t, len(l.bad)))
    sys.exit(1 if l.bad else 0)


if __name__ == '__main__':
    main()
