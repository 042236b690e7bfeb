#!/usr/bin/env python3
"""huge-power.py: power cuts around a huge directory (powercut.sh starts it, with WHAT=huge). As root.

  huge-power.py prepare LAB     makes LAB/src
  huge-power.py write LAB       $DST is the disk that will lose its power, $ACK takes what is promised
  huge-power.py check LAB       $DST is the disk afterwards, $ACKED what had been promised before the cut

Some files of a directory that is not populated are read, and lose their marks while it is still P. Then somebody writes
into them, in place and with fdatasync, which commits nothing but his bytes: the directory's L must be durable by then
(D2, D6), else a later start makes the directory anew and his bytes are gone. The checker resumes and finishes each
migration and wants every acknowledged write, or one that came later.

KIND=pending (WHAT=pending): a directory of ordinary size; each file is pending when it is opened to be written, once (D2).

KIND=own (WHAT=own): new files in a huge directory that is P, each synced, every third removed; nothing else says that they are there.

KIND=adopt (WHAT=adopt): dst is an earlier copy that is equal, and the mount adopts it: its files never have a mark, so only the
directory's L keeps a later start from taking a changed one for a stale copy.
"""
import os
import subprocess
import sys
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import lab

KIND = os.environ.get('KIND', 'huge')
ADOPT = KIND == 'adopt'
# Files that are there, how many of them are written, writes, bytes of each.
NAMES, FILES, WRITES, SIZE = {'huge': (1100, 6, 120), 'adopt': (180, 6, 24), 'pending': (120, 120, 120), 'own': (1100, 6, 120)}[KIND] + (12_288,)
EVERY = NAMES // FILES
PATHS = ['huge/f%04d' % (i * EVERY) for i in range(FILES - 1)] + ['huge/sub/inside']


def prepare(where):
    os.makedirs(where + '/src/huge/sub')
    for i in range(NAMES):
        with open('%s/src/huge/f%04d' % (where, i), 'wb') as f:
            f.write(lab.data('src %d' % i, SIZE if i % EVERY == 0 else 10))
    with open(where + '/src/huge/sub/inside', 'wb') as f:
        f.write(lab.data('inside', SIZE))


def body(mig, k):
    return lab.data('write %d %d' % (mig, k), SIZE)


def make_own(w, mig, huge):
    """New files; what becomes of a removed one is promised after a sync(2)."""
    for k in range(WRITES):
        fd = os.open('%s/own%d' % (huge, k), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(fd, body(mig, k))
        os.fsync(fd)
        os.close(fd)
        w.promise(mig, k)
        if k % 3 == 2:
            os.unlink('%s/own%d' % (huge, k - 1))
            if k % 9 == 2:
                os.sync()
                w.promise(mig, 'gone', k - 1)


def check_own(root, mig, last, gone):
    """What is wrong with the files of one migration."""
    bad = []
    for k in range(WRITES):
        p = '%s/huge/own%d' % (root, k)
        there = os.path.exists(p)
        # Promises may be told late: it is removed after the next one was made.
        removed = k % 3 == 1 and (last > k or os.path.exists('%s/huge/own%d' % (root, k + 1)))
        if k <= last and not removed and (not there or lab.read(p) != body(mig, k)):
            bad.append('%s: %s, write %d was acknowledged' % (p, 'other bytes' if there else 'gone', last))
        if there and k % 3 == 1 and k <= gone:
            bad.append('%s: it was removed' % p)
    return bad


def write(where):
    src, dst, at = where + '/src', os.environ['DST'], where + '/mnt'
    os.makedirs(at, exist_ok=True)
    w = lab.Writer()
    for mig in range(10_000):
        root = '%s/dst%d' % (dst, mig)
        os.mkdir(root)
        if ADOPT:
            subprocess.run(['cp', '-a', src + '/.', root], check=True)
            os.sync()
        m = w.mount = lab.Mount(src, root, at, where + '/log', ['--no-background'] + ['--adopt'] * ADOPT)
        if KIND == 'huge':
            for p in PATHS:
                lab.read(at + '/' + p)
            time.sleep(2.6)         # their marks go, and that becomes durable
        fds = []
        if KIND == 'own':
            make_own(w, mig, at + '/huge')
        for k in range(0 if KIND == 'own' else WRITES):
            if k < FILES:
                fds.append(os.open(at + '/' + PATHS[k], os.O_WRONLY))
            if os.pwrite(fds[k % FILES], body(mig, k), 0) != SIZE:
                raise OSError('short write')
            os.fdatasync(fds[k % FILES])
            w.promise(mig, k)
        for fd in fds:
            os.close(fd)
        m.stop()
        w.mount = None


def check(where):
    src, dst, at = where + '/src', os.environ['DST'], where + '/check'
    os.makedirs(at, exist_ok=True)
    acked = lab.latest((int(w[0]), w[1]) for w in lab.promised() if len(w) == 2)
    gone = lab.latest((int(w[0]), w[2]) for w in lab.promised() if len(w) == 3)
    there = lab.migrations(dst)
    bad = ['dst%d is gone' % mig for mig in acked if mig not in there]
    for mig in there[-2:]:
        last = acked.get(mig, -1)
        if ADOPT and not acked.get(mig, -1) >= 0:
            continue                # The copy that was to be adopted may not be there.
        m = lab.Mount(src, '%s/dst%d' % (dst, mig), at, where + '/check-log')
        try:
            m.finish()
        except RuntimeError as e:
            bad.append(str(e))
        finally:
            m.stop()
        if KIND == 'own':
            root = '%s/dst%d' % (dst, mig)
            bad += check_own(root, mig, last, gone.get(mig, -1))
            if len([n for n in os.listdir(root + '/huge') if n[0] == 'f']) != NAMES:
                bad.append('dst%d: not all names of src' % mig)
            continue
        for i, p in enumerate(PATHS):
            done = [k for k in range(i, last + 1, FILES)]
            # What was acknowledged, or anything later: the promise may be told late.
            may = [body(mig, k) for k in range(done[-1] if done else i, WRITES, FILES)]
            if not done:
                may.append(lab.read(src + '/' + p))
            got = lab.read('%s/dst%d/%s' % (dst, mig, p))
            # A write that was cut may be there in part.
            torn = len(got) == SIZE and all(any(got[b:b + 512] == v[b:b + 512] for v in may) for b in range(0, SIZE, 512))
            if not torn:
                what = 'src\'s bytes' if got == lab.read(src + '/' + p) else 'other bytes'
                bad.append('dst%d/%s: %s after write %d of %d was acknowledged' % (mig, p, what, done[-1] if done else -1, last))
        n = len(os.listdir('%s/dst%d/huge' % (dst, mig)))
        if n != NAMES + 1:
            bad.append('dst%d: %d names' % (mig, n))
    print('\n'.join(bad[:15]))
    return 1 if bad else 0


if __name__ == '__main__':
    lab.main(__doc__, prepare, write, check)
