#!/usr/bin/env python3
"""carried-power.py: power cuts while the background brings small files (powercut.sh starts it, with WHAT=carried). As root.

  carried-power.py prepare LAB     makes LAB/src
  carried-power.py write LAB       $DST is the disk that will lose its power, $ACK takes what is promised
  carried-power.py check LAB       $DST is the disk afterwards

Small files come under their names, without a mark, in directories that are P. Somebody else has dst's journal committed all the
time, so that a cut leaves files with their size and times and without their bytes: nothing in such a directory counts (D5). The
checker resumes and finishes each migration and wants src's bytes.
"""
import os
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import lab

DIRS, FILES, SIZE = 12, 60, 30_000


def paths():
    return ['d%d/f%d' % (d, n) for d in range(DIRS) for n in range(FILES)]


def prepare(where):
    for d in range(DIRS):
        os.makedirs('%s/src/d%d' % (where, d))
    for p in paths():
        with open('%s/src/%s' % (where, p), 'wb') as f:
            f.write(lab.data(p, SIZE))


def write(where):
    dst, at = os.environ['DST'], where + '/mnt'
    os.makedirs(at, exist_ok=True)
    w = lab.Writer()
    for mig in range(10_000):
        os.mkdir('%s/dst%d' % (dst, mig))
        w.mount = lab.Mount(where + '/src', '%s/dst%d' % (dst, mig), at, where + '/log')
        beside = lab.Beside(lab.noise(dst))
        w.mount.wait_complete()
        beside.end()
        w.mount.stop()
        w.mount = None
        w.promise(mig)


def check(where):
    src, dst, at = where + '/src', os.environ['DST'], where + '/check'
    os.makedirs(at, exist_ok=True)
    bad = []
    for mig in lab.migrations(dst)[-2:]:
        root = '%s/dst%d' % (dst, mig)
        m = lab.Mount(src, root, at, where + '/check-log')
        try:
            m.finish()
        except RuntimeError as e:
            bad.append(str(e))
        finally:
            m.stop()
        for p in paths():
            try:
                got = lab.read(root + '/' + p)
            except OSError as e:
                bad.append('dst%d/%s: %s' % (mig, p, e))
                continue
            if got != lab.read(src + '/' + p):
                bad.append('dst%d/%s: %s' % (mig, p, 'zeros' if len(got) == SIZE and not any(got) else 'other bytes, %d' % len(got)))
        bad += ['trace: ' + t for t in lab.traces(root)]
    print('\n'.join(bad[:15]))
    return 1 if bad else 0


if __name__ == '__main__':
    lab.main(__doc__, prepare, write, check)
