#!/usr/bin/env python3
"""manifest.py [RUNS] - what `mount --manifest` costs who waits for a pending file, and the whole of a mount.

As root. Two ext4 images in memory (DIR=/dev/shm), src cached. In turn, RUNS (default 7) times, without and with --manifest:
  demand   no background: files of 64 KiB, 1 MiB and 8 MiB, each opened and read to its end for the first time, one after the
           other; the median of each size, and how many of them have a digest then
  whole    `mount -f --finish` of 10,000 files of 4 KiB, 100 of 2 MiB and two of 200 MiB that nobody reads
Prints the medians of the runs, all values, and the ratio. MIRRORFS=... is the program (a release build is found by itself);
several, separated by spaces, are compared in turn. PAUSE=0.002 sleeps so many seconds between two files. WHAT=demand or WHAT=whole does only that.
"""
import os, statistics, subprocess, sys, time
sys.dont_write_bytecode = True
here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, '../crash'))
import lab

runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
what = os.environ.get('WHAT', 'demand whole').split()
pause = float(os.environ.get('PAUSE', '0'))
os.environ['TMPDIR'] = os.environ.get('DIR', '/dev/shm')
SIZES = {'64 KiB': (64 << 10, 300), '1 MiB': (1 << 20, 80), '8 MiB': (8 << 20, 12)}


def image(work, name, size):
    at = '%s/%s' % (work, name)
    with open(at + '.img', 'wb') as f:
        f.truncate(size)
    subprocess.run(['mkfs.ext4', '-q', '-E', 'lazy_itable_init=0', at + '.img'], check=True)
    os.mkdir(at)
    subprocess.run(['mount', '-o', 'loop', at + '.img', at], check=True)
    return at


def fill(src):
    for size, (bytes_, count) in SIZES.items():
        os.makedirs('%s/demand/%d' % (src, bytes_))
        for n in range(count):
            with open('%s/demand/%d/%d' % (src, bytes_, n), 'wb') as f:
                f.write(os.urandom(bytes_))
    os.makedirs(src + '/whole')
    for n in range(10000):
        if n % 1000 == 0:
            os.mkdir('%s/whole/%d' % (src, n // 1000))
        with open('%s/whole/%d/%d' % (src, n // 1000, n), 'wb') as f:
            f.write(os.urandom(4096))
    for n in range(102):
        with open('%s/whole/large%d' % (src, n), 'wb') as f:
            f.write(os.urandom((2 << 20) if n < 100 else 200 << 20))
    os.sync()
    time.sleep(3)  # Ctimes count from then on.


def demand(binary, src, dst, at, manifest):
    extra = ['--manifest', manifest] if manifest else []
    daemon = subprocess.Popen([binary, 'mount', '-f', '--no-background', *extra, src + '/demand', dst, at],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not os.path.ismount(at):
        time.sleep(0.01)
    found = {}
    for size, (bytes_, count) in SIZES.items():
        names = os.listdir('%s/%d' % (at, bytes_))
        time.sleep(0.3)  # The directory becomes durable.
        took = []
        for name in names:
            t = time.perf_counter()
            fd = os.open('%s/%d/%s' % (at, bytes_, name), os.O_RDONLY)
            while os.read(fd, 1 << 20):
                pass
            took.append(time.perf_counter() - t)
            os.close(fd)
            time.sleep(pause)
        found[size] = statistics.median(took) * 1e3
    subprocess.run(['umount', at], check=True)
    daemon.wait(60)
    if manifest:
        digests = open(manifest).read().count('blake3digest=')
        found['digests'] = digests
        os.unlink(manifest)
    return found


def whole(binary, src, dst, at, manifest):
    extra = ['--manifest', manifest] if manifest else []
    t = time.perf_counter()
    subprocess.run([binary, 'mount', '-f', '--finish', *extra, src + '/whole', dst, at], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    took = time.perf_counter() - t
    if manifest:
        os.unlink(manifest)
    return {'whole, s': took}


lab.own_namespace()
work = lab.scratch('mirrorfs-bench.')
binaries = os.environ.get('MIRRORFS', '').split() or [lab.binary()]
results = {}
try:
    src, disk = image(work, 'src', 1 << 30), image(work, 'dst', 1 << 30)
    at = work + '/mnt'
    os.mkdir(at)
    fill(src)
    for run in range(runs):
        for test in what:
            for binary in binaries:
                for manifest in (None, work + '/manifest'):
                    dst = disk + '/d'
                    os.mkdir(dst)
                    found = globals()[test](binary, src, dst, at, manifest)
                    for key, value in found.items():
                        results.setdefault((key, binary), {}).setdefault(bool(manifest), []).append(value)
                    subprocess.run(['rm', '-rf', dst], check=True)
                    os.sync()
    for (key, binary), found in results.items():
        with_ = found[True]
        values = ' '.join('%.2f' % v for v in sorted(with_))
        name = '' if len(binaries) == 1 else ' ' + binary
        if False not in found:
            print('%-9s%s median %.0f of %d   (%s)' % (key, name, statistics.median(with_), sum(c for _, c in SIZES.values()), values))
            continue
        a, b = statistics.median(found[False]), statistics.median(with_)
        print('%-9s%s without %.2f   with %.2f   ratio %.2f   (%s; %s)'
              % (key, name, a, b, b / a, ' '.join('%.2f' % v for v in sorted(found[False])), values))
finally:
    subprocess.run(['umount', '-l', work + '/mnt'], stderr=subprocess.DEVNULL)
    for name in ('src', 'dst'):
        subprocess.run(['umount', '-l', '%s/%s' % (work, name)], stderr=subprocess.DEVNULL)
    lab.remove(work)
