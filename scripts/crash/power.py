#!/usr/bin/env python3
"""power.py: what the power-cut harness runs (powercut.sh starts it). As root.

  power.py prepare LAB        makes LAB/src
  power.py write LAB          $DST is the disk that will lose its power, $ACK takes what is promised
  power.py check LAB          $DST is the disk afterwards, $ACKED what had been promised before the cut

The writer does one migration after the other into $DST/dst0, dst1, ...: while the walker runs it reads at random,
writes, creates, deletes, renames and truncates, each made durable (fsync of the file and of its directories) and
acknowledged before the next; then it finishes. LAB/ops tells all that it ever began. The checker replays those, and
for every name knows the states that it may be in: the one that was acknowledged last, and any that came later.
A migration that was cut is resumed and finished first. What no operation touched must be as src has it.
ONLY="write truncate" chooses operations.
"""
import json
import os
import random
import stat
import sys
import threading
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import lab

OPS = 40                    # in one migration
REG, DIR = stat.S_IFREG, stat.S_IFDIR


class Node:
    """mtime is known only while it is what a user has set."""

    def __init__(self, kind, data=None, mode=None, same_as=None):
        self.kind, self.data, self.mode, self.same_as, self.mtime = kind, data, mode, same_as, None

    def state(self):
        return (self.kind, self.data, self.mode, self.same_as, self.mtime)


class Model:
    """Names -> Node; and for every name the states it was in: [(number of the operation, state or None)]."""

    def __init__(self, src):
        self.names, self.history = {}, {}
        inodes = {}
        for rel in lab.tree(src):
            l = lab.look(src + '/' + rel)
            n = inodes.get(l['ino']) if l['kind'] != DIR else None
            if n is None:
                n = inodes[l['ino']] = Node(l['kind'], lab.read(src + '/' + rel) if l['kind'] == REG else None, l['mode'], rel)
            self.names[rel] = n
            self.history[rel] = [(-1, n.state())]

    def apply(self, k, op):
        """One operation, as a list of its name and arguments."""
        before = {p: n.state() for p, n in self.names.items()}
        what, p = op[0], op[1]
        if what == 'write':
            n, off, b = self.names[p], op[2], lab.data(op[3], op[4])
            n.data = n.data[:off].ljust(off, b'\0') + b + n.data[off + len(b):]
            n.same_as = n.mtime = None
        elif what == 'truncate':
            n = self.names[p]
            n.data, n.same_as, n.mtime = n.data[:op[2]].ljust(op[2], b'\0'), None, None
        elif what == 'chmod':
            self.names[p].mode, self.names[p].same_as = op[2], None
        elif what == 'utime':
            self.names[p].mtime, self.names[p].same_as = op[2], None
        elif what == 'create':
            self.names[p] = Node(REG, lab.data(op[2], op[3]), 0o644)
        elif what == 'mkdir':
            self.names[p] = Node(DIR, None, 0o755)
        elif what == 'unlink':
            del self.names[p]
        elif what == 'rename':
            for q in [q for q in self.names if q == p or q.startswith(p + '/')]:
                self.names[op[2] + q[len(p):]] = self.names.pop(q)
        for q in set(before) | set(self.names):
            now = self.names[q].state() if q in self.names else None
            if before.get(q) != now:
                self.history.setdefault(q, [(-1, None)]).append((k, now))

    def allowed(self, path, acked):
        """The states that a name may be in when operation `acked` was the last that was acknowledged."""
        h = self.history[path]
        past = [s for k, s in h if k <= acked]
        return past[-1:] + [s for k, s in h if k > acked]


def fsync(path):
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def choose(model, rng):
    """A random operation that will work."""
    files = sorted(p for p, n in model.names.items() if n.kind == REG)
    dirs = sorted(p for p, n in model.names.items() if n.kind == DIR)
    new = '%s/n%d' % (rng.choice(dirs), rng.randrange(10**9))
    f = rng.choice(files)
    often = dict(write=10, truncate=4, chmod=2, utime=3, create=5, mkdir=1, unlink=5, rename=4, rename_over=2, rename_dir=2)
    some = os.environ.get('ONLY', ' '.join(often)).split()
    what = rng.choices(some, [often[w] for w in some])[0]
    if what == 'write':
        size, n = len(model.names[f].data), rng.choice([1, 4096, 30_000])
        # Mostly in place: then a user's fdatasync commits nothing but his bytes.
        at = rng.randrange(size - n + 1) if size >= n and rng.random() < 0.7 else rng.randrange(size + 1)
        return [what, f, at, '%d' % rng.randrange(10**9), n]
    if what == 'truncate':
        return [what, f, rng.choice([0, 0, rng.randrange(len(model.names[f].data) + 1)])]
    if what == 'chmod':
        return [what, f, rng.choice([0o600, 0o640, 0o755])]
    if what == 'utime':
        return [what, f, rng.randrange(2 * 10**18)]
    if what == 'create':
        return [what, new, '%d' % rng.randrange(10**9), rng.choice([0, 100, 50_000])]
    if what == 'mkdir':
        return [what, new]
    if what == 'unlink':
        return [what, f]
    if what == 'rename_over':
        g = rng.choice(files)
        return ['rename', f, g if model.names[g] is not model.names[f] else new]
    d = rng.choice(dirs) if what == 'rename_dir' else f
    return ['rename', d, new] if not new.startswith(d + '/') else ['mkdir', new]


def do(at, op):
    """Does it and makes it durable."""
    what, p = op[0], at + '/' + op[1]
    if what == 'write':
        fd = os.open(p, os.O_WRONLY)
        b = lab.data(op[3], op[4])
        if os.pwrite(fd, b, op[2]) != len(b):
            raise OSError('short write')
        (os.fsync if op[2] % 2 else os.fdatasync)(fd)
        os.close(fd)
    elif what == 'truncate':
        os.truncate(p, op[2])
        fsync(p)
    elif what == 'chmod':
        os.chmod(p, op[2])
        fsync(p)
    elif what == 'utime':
        os.utime(p, ns=(op[2], op[2]))
        fsync(p)
    elif what == 'create':
        fd = os.open(p, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        b = lab.data(op[2], op[3])
        if os.write(fd, b) != len(b):
            raise OSError('short write')
        os.fsync(fd)
        os.close(fd)
        fsync(os.path.dirname(p))
    elif what == 'mkdir':
        os.mkdir(p, 0o755)
        fsync(os.path.dirname(p))
    elif what == 'unlink':
        os.unlink(p)
        fsync(os.path.dirname(p))
    elif what == 'rename':
        q = at + '/' + op[2]
        os.rename(p, q)
        fsync(os.path.dirname(q))
        fsync(os.path.dirname(p))


def write(where):
    os.umask(0o022)
    src, dst, at = where + '/src', os.environ['DST'], where + '/mnt'
    os.makedirs(at, exist_ok=True)
    log = open(where + '/ops', 'w')
    rng = random.Random(int(os.environ.get('SEED', '1')))
    w = lab.Writer()

    def reads(names):
        """Somebody who reads at random, so that some files are pulled because they are asked for."""
        r = random.Random(1)
        while not done.is_set():
            try:
                lab.read(at + '/' + r.choice(names))
            except OSError:
                time.sleep(0.01)        # deleted or renamed meanwhile

    for mig in range(10_000):
        root = '%s/dst%d' % (dst, mig)
        os.mkdir(root)
        fsync(dst)
        model = Model(src)
        names = [p for p, n in model.names.items() if n.kind == REG]
        # Every other without the walker: then most is pending when it is changed, and the last part is what the
        # walker of a second mount does.
        lazy = mig % 2 == 0
        m = w.mount = lab.Mount(src, root, at, where + '/log', ['--no-background'] if lazy else [])
        done = threading.Event()
        reader = threading.Thread(target=reads, args=(names,), daemon=True)
        reader.start()
        for k in range(OPS):
            op = choose(model, rng)
            log.write(json.dumps([mig, k, op]) + '\n')
            log.flush()
            do(at, op)
            model.apply(k, op)
            w.promise('done', mig, k)
            time.sleep(rng.choice([0, 0.002, 0.02]))
        done.set()
        reader.join()
        if lazy:
            m.stop()
            m = w.mount = lab.Mount(src, root, at, where + '/log')
        m.finish()
        w.mount = None
        w.promise('finished', mig)


def check(where):
    src, dst, at = where + '/src', os.environ['DST'], where + '/check'
    os.makedirs(at, exist_ok=True)
    lines = list(lab.promised())
    acked = lab.latest((int(w[1]), w[2]) for w in lines if w[0] == 'done')
    finished = {int(w[1]) for w in lines if w[0] == 'finished'}
    ops = {}
    for line in open(where + '/ops'):
        if line.endswith('\n'):
            mig, k, op = json.loads(line)
            ops.setdefault(mig, []).append((k, op))
    there = lab.migrations(dst)
    bad = ['dst%d is gone' % mig for mig in sorted(finished | set(acked)) if mig not in there]
    # The one that was cut, the one before it, and one of the older ones.
    some = there[-2:] + ([random.choice(there[:-2])] if len(there) > 2 else [])
    for mig in some:
        bad += ['dst%d: %s' % (mig, b) for b in check_one(src, '%s/dst%d' % (dst, mig), at, where, ops.get(mig, []), acked.get(mig, -1), mig in finished)]
    if bad:
        print('%d violations' % len(bad))
        print('\n'.join(bad[:15]))
    return 1 if bad else 0


def check_one(src, root, at, where, ops, acked, finished):
    model, bad = Model(src), []
    for k, op in ops:
        model.apply(k, op)
    # After the control directory is gone the migration is over, acknowledged or not.
    plain = finished or (acked == OPS - 1 and not os.path.lexists(root + '/' + lab.CONTROL))
    if not plain:
        m = lab.Mount(src, root, at, where + '/check-log')
        try:
            bad += compare(model, src, at, acked, [p for p, h in model.history.items() if len(h) > 1], 'after the cut')
            m.finish()
        except RuntimeError as e:
            return bad + [str(e)]
        finally:
            m.stop()
    bad += ['trace: ' + t for t in lab.traces(root)]
    bad += ['%s should not be there' % p for p in set(lab.tree(root)) - set(model.history)]
    return bad + compare(model, src, root, acked, model.history, 'after finish')


def compare(model, src, root, acked, paths, when):
    bad, inodes = [], {}
    # Directories whose names were changed have other times.
    changed = {os.path.dirname(p) for p, h in model.history.items() if len(h) > 1}
    for p in paths:
        allowed = model.allowed(p, acked)
        touched = len(model.history[p]) > 1
        what = '%s: %s (last acknowledged %d, changed by %s)' % (when, p, acked, [k for k, _ in model.history[p][1:]])
        try:
            l = lab.look(root + '/' + p)
        except FileNotFoundError:
            if None not in allowed:
                bad.append(what + ': is missing')
            continue
        except NotADirectoryError:
            continue
        states = [s for s in allowed if s and s[0] == l['kind']]
        if not states:
            bad.append(what + (': came back' if allowed == [None] else ': has another type'))
            continue
        # While a rename is in flight a name may show an older state of its new inode.
        if l['kind'] == REG:
            got = lab.read(root + '/' + p)
            # A file that is being made grows from nothing: with somebody else's syncfs ext4 has its size before its bytes.
            nothing = [b''] if allowed[0] is None else []
            wrong = unlike(got, nothing + [s[1] for s in states])
            if wrong:
                bad.append('%s: %s' % (what, wrong))
        if l['mode'] not in [s[2] for s in states]:
            bad.append('%s: mode %o' % (what, l['mode']))
        if l['mtime'] not in [s[4] for s in states] + [l['mtime'] for s in states if s[4] is None]:
            bad.append('%s: mtime %d, should be %s' % (what, l['mtime'], [s[4] for s in states]))
        if not touched and root != src and when == 'after finish':
            want = lab.look(src + '/' + p)
            keys = ['uid', 'gid', 'size', 'target', 'xattrs'] + ([] if p in changed else ['mtime'])
            bad += ['%s: %s: %r, should be %r' % (what, k, l[k], want[k]) for k in keys if l[k] != want[k]]
            if l['kind'] != DIR and inodes.setdefault(want['ino'], l['ino']) != l['ino']:
                bad.append(what + ': is not linked with its other names')
    return bad


def unlike(got, versions):
    """Why `got` is not made of blocks of the versions, which come in their order; None when it is."""
    if len(got) not in [len(v) for v in versions] and not min(map(len, versions)) < len(got) < max(map(len, versions)):
        return '%d bytes, should be %s' % (len(got), sorted({len(v) for v in versions}))

    def piece(k, i, n):
        """Bytes of a version. Past its end it has zeros if a later one is longer: the size may come before the bytes. When it was
        made shorter the size comes first, and zeros in the place of bytes are a loss, but for the rest of the last block of
        what nobody was told is done: ext4 writes that as zeros first (9 of 60 power cuts under ftruncate, fsync without mirrorfs)."""
        b, end = versions[k][i:i + n], len(versions[k])
        grows = any(len(w) > i + len(b) for w in versions[k + 1:])
        zeroed = k > 0 and i + n <= -(-end // 4096) * 4096
        return b.ljust(n, b'\0') if grows or zeroed else b
    for i in range(0, len(got), 512):
        b = got[i:i + 512]
        pieces = [piece(k, i, len(b)) for k in range(len(versions))]
        if b not in pieces:
            # A write that was cut may end inside a block.
            if len(versions) > 1 and all(any(c == p[j] for p in pieces if j < len(p)) for j, c in enumerate(b)):
                continue
            return 'wrong bytes at %d of %d%s' % (i, len(got), ' (zeros)' if not any(b) else '')
    return None


def prepare(where):
    os.makedirs(where + '/src', exist_ok=True)
    if not os.listdir(where + '/src'):
        lab.fill_src(where + '/src', 'power', 2, 250, big=1)


if __name__ == '__main__':
    lab.main(__doc__, prepare, write, check)
