#!/usr/bin/env python3
"""salvage-power.py: power cuts around files that src cannot give whole (powercut.sh, WHAT=salvage). As root.

  salvage-power.py prepare LAB    makes LAB/real
  salvage-power.py write LAB      $DST is the disk that will lose its power, $ACK takes what is promised
  salvage-power.py check LAB      $DST is the disk afterwards, $ACKED what had been promised before the cut

SRC is a view (the kit's badsrc.py) in which some pages of two files cannot be read. When the ledger says which, the others are
promised: after the cut src can read nothing of the files any more (M7), and each page is src's or EIO, and EIO only where it was bad. Into one of
the files a user writes pages, and syncs them; in every fourth migration its file in src is another one by then. Then src can read all, and
both files become whole: of one version of src, but for the user's pages.
"""
import errno
import json
import os
import random
import subprocess
import sys
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import lab

PAGE = 4096
SIZES = {'kept': 3_000_001, 'users': 600_001, 'other': 600_001}
BAD = {'kept': [0, 3, 4, 300, 732], 'users': [7, 146], 'other': [1, 90]}
NAMES = sorted(SIZES)


def original(name):
    return lab.data('src ' + name, SIZES[name])


def put(where, name, content, age=0):
    """A version of a file in src. Its time says which: one that is written again is the same file."""
    with open('%s/real/%s' % (where, name), 'wb') as f:
        f.write(content)
    os.utime('%s/real/%s' % (where, name), ns=(lab.T0, lab.T0 + age))


def second():
    return lab.data('another', 700_001)


def prepare(where):
    os.makedirs(where + '/real')
    for name in NAMES:
        put(where, name, original(name))


class View:
    """What src is: a view of LAB/real, at LAB/src. `bad`: nothing at all can be read, or the pages in BAD."""

    def __init__(self, where, nothing=False):
        self.ctl, at = where + '/ctl', where + '/src'
        os.makedirs(at, exist_ok=True)
        rules = ['path=%s op=read off=%d-%d err=EIO' % (n, p * PAGE, (p + 1) * PAGE) for n in NAMES for p in BAD[n]]
        rules = ['op=read err=EIO'] if nothing else rules
        words = [w for r in rules for w in ('--rule', r)]
        self.at, self.proc = at, subprocess.Popen(
            [sys.executable, lab.kit('badsrc.py'), where + '/real', at, '--ctl', self.ctl, *words],
            preexec_fn=lambda: lab.libc.prctl(1, 9))
        while not lab.mounted_at(at):
            time.sleep(0.005)
        os.statvfs(at)

    def mend(self):
        subprocess.run([sys.executable, lab.kit('badsrc.py'), '--ctl', self.ctl, '--do', 'off'], check=True,
                       stdout=subprocess.DEVNULL)

    def end(self):
        self.proc.kill()
        self.proc.wait()
        lab.libc.umount2(os.fsencode(self.at), 2)


def ledger(at):
    rc, out = lab.ask('errors', at, '--json')
    lines = [json.loads(line) for line in out.splitlines() if line.startswith('{')]
    return {e['path']: e.get('ranges', []) for e in lines}


def wait_told(at, names):
    """Each bad page is in the ledger: the rest is promised."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = ledger(at)
        pages = {n: sorted({p for a, b in found.get(n, []) for p in range(a // PAGE, (b + PAGE - 1) // PAGE)}) for n in names}
        if all(pages[n] == BAD[n] for n in names):
            return
        time.sleep(0.02)
    raise RuntimeError('the ledger has only %r' % found)


def write(where):
    dst, at = os.environ['DST'], where + '/mnt'
    os.makedirs(at, exist_ok=True)
    view = View(where)
    log, w = open(where + '/ops', 'w'), lab.Writer(view.end)
    rng = random.Random(int(os.environ.get('SEED', '1')))
    for mig in range(10_000):
        root = '%s/dst%d' % (dst, mig)
        os.mkdir(root)
        w.mount = lab.Mount(view.at, root, at, where + '/log', ['-o', 'large=64K'])
        wait_told(at, NAMES)
        w.promise(mig, 0)
        fd = os.open(at + '/users', os.O_RDWR)
        for k in range(1, 6):
            page = rng.choice([10, 20, 30, 40, 100])
            log.write(json.dumps([mig, k, page]) + '\n')
            log.flush()
            os.pwrite(fd, lab.data('user %d %d' % (mig, k), PAGE), page * PAGE)
            time.sleep(rng.choice([0, 0.003, 0.02]))
            if k % 2:
                (os.fsync if rng.random() < 0.5 else os.fdatasync)(fd)
                w.promise(mig, k)
            if k == 3 and mig % 3 == 0:
                os.close(fd)
                w.mount.kill()
                w.mount.stop()
                w.mount = lab.Mount(view.at, root, at, where + '/log', ['-o', 'large=64K'])
                fd = os.open(at + '/users', os.O_RDWR)
        os.close(fd)
        if mig % 2:
            # What is here of it is of no use any more.
            tag = second() if mig % 4 == 1 else original('other')
            put(where, 'other', tag, 7)
            lab.ask('errors', '--retry', at)
            time.sleep(rng.choice([0.1, 0.3, 0.6]))
        w.mount.stop()
        w.mount = None
        put(where, 'other', original('other'))


def pages(path, size):
    """Each page, or None where it cannot be read."""
    fd, out = os.open(path, os.O_RDONLY), []
    for at in range(0, size, PAGE):
        try:
            out.append(os.pread(fd, min(PAGE, size - at), at))
        except OSError as e:
            if e.errno != errno.EIO:
                raise
            out.append(None)
    os.close(fd)
    return out


def wrong(got, versions, bad, what):
    """`versions`: of each page those that it may be."""
    for n, page in enumerate(got):
        if page is None and n not in bad:
            return ['%s: page %d cannot be read' % (what, n)]
        if page is not None and page not in versions[n]:
            return ['%s: page %d is %s' % (what, n, 'zeros' if not any(page) else 'other bytes')]
    return []


def cut(b):
    return [b[a:a + PAGE] for a in range(0, len(b), PAGE)]


def check_one(where, mig, last, ops):
    dst, at, bad = os.environ['DST'], where + '/check', []
    root, what = '%s/dst%d' % (dst, mig), 'dst%d (op %d)' % (mig, last)
    versions = {n: [[p] for p in cut(original(n))] for n in NAMES}
    for k, page in ops:
        new = lab.data('user %d %d' % (mig, k), PAGE)
        versions['users'][page] = [new] if k <= last else versions['users'][page] + [new]
    # The other one may be on its way to be another: then it is asked of src.
    nothing = last >= 0
    names = [n for n in NAMES if n != 'other' or mig % 2 == 0] if nothing else NAMES
    view = View(where, nothing)
    m = lab.Mount(view.at, root, at, where + '/check-log', ['-o', 'large=64K'])
    try:
        for n in names:
            if not nothing:
                continue
            bad += wrong(pages(at + '/' + n, SIZES[n]), versions[n], BAD[n], what + ' ' + n)
        view.mend()
        end = time.monotonic() + 60
        while json.loads(m.status()[1])['state'] != 'COMPLETE' and time.monotonic() < end:
            lab.ask('errors', '--retry', at)
            time.sleep(0.1)
        m.finish()
    except (RuntimeError, OSError) as e:
        bad.append('%s: %s' % (what, e))
    finally:
        m.stop()
        view.end()
    for n in NAMES:
        b = lab.read(root + '/' + n)
        if len(b) != SIZES[n]:
            bad.append('%s %s: %d bytes' % (what, n, len(b)))
        bad += wrong(cut(b), versions[n], [], what + ' finished ' + n)
    return bad + ['trace: ' + t for t in lab.traces(root)]


def check(where):
    os.makedirs(where + '/check', exist_ok=True)
    put(where, 'other', original('other'))
    acked, ops = lab.latest((int(w[0]), w[1]) for w in lab.promised() if len(w) == 2), {}
    for line in open(where + '/ops'):
        if line.endswith('\n'):
            mig, k, page = json.loads(line)
            ops.setdefault(mig, []).append((k, page))
    there = lab.migrations(os.environ['DST'])
    bad = ['dst%d is gone' % mig for mig in acked if mig not in there]
    for mig in there[-2:]:
        bad += check_one(where, mig, acked.get(mig, -1), ops.get(mig, []))
    print('\n'.join(bad[:15]))
    return 1 if bad else 0


if __name__ == '__main__':
    lab.main(__doc__, prepare, write, check)
