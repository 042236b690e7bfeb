#!/usr/bin/env bash
# readahead.sh [RUNS] - how fast a large pending file is read in order, and at random, while the background does not bring it.
# As root. Sources: a local one that is cached, and the test kit's slowfs with 1 and 5 ms for each request (MIRRORFS_KIT, gcc,
# libfuse3-dev). dd reads a file of SIZE=256 MiB with blocks of 128 KiB and of 1 MiB, a program 200 times 4 KiB at random. Each run has
# a fresh DST; `held`: the background is paused, `free`: the rest of the file follows. Medians of RUNS (5). MIRRORFS=... is the program,
# OTHER=... one that is measured in turn with it (an older build). US="0 1000 5000", READS="128K 1M random", WHO="held free" choose,
# DIR=/dev/shm is where the trees are.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec python3 - "$here" "${1:-5}" <<'PY'
import os, random, shutil, statistics, subprocess, sys, time
here, runs = sys.argv[1], int(sys.argv[2])
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(here, '../crash'))
os.environ['TMPDIR'] = os.environ.get('DIR', '/dev/shm')
import lab

size = int(os.environ.get('SIZE', 256))
sources = [int(us) for us in os.environ.get('US', '0 1000 5000').split()]
reads = os.environ.get('READS', '128K 1M random').split()
states = os.environ.get('WHO', 'held free').split()
programs = [p for p in (os.environ.get('OTHER'), lab.binary()) if p]
lab.own_namespace()
work = lab.scratch('mirrorfs-bench.')
src, slow, dst, at = (work + '/' + d for d in ('src', 'slow', 'dst', 'mnt'))
for d in src, slow, at:
    os.mkdir(d)
block = os.urandom(1 << 20)
with open(src + '/big', 'wb') as f:
    for n in range(size):
        f.write(block[n:] + block[:n])
if any(sources):
    kit = lab.kit('slowfs.c') or lab.die('readahead.sh: no slowfs.c (MIRRORFS_KIT)')
    flags = subprocess.run(['pkg-config', '--cflags', '--libs', 'fuse3'], capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(['gcc', '-O2', '-o', work + '/slowfs', kit, *flags, '-lpthread'], check=True)


def wait_mounted(path):
    while not lab.mounted_at(path):
        time.sleep(0.01)


def at_random(fd):
    where = random.Random(7)
    for _ in range(200):
        os.pread(fd, 4096, where.randrange(size << 8) << 12)


def one(program, us, read, state):
    os.environ['MIRRORFS'] = program
    os.mkdir(dst)
    view = us and subprocess.Popen([work + '/slowfs', src, slow, 'us=%d' % us], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if view:
        wait_mounted(slow)
    mount = lab.Mount(slow if us else src, dst, at, work + '/log', ['--no-background'])
    try:
        os.stat(at + '/big')
        if state == 'held':
            lab.ask('pause', at)
        time.sleep(0.3)
        fd = os.open(at + '/big', os.O_RDONLY)
        t = time.perf_counter()
        if read == 'random':
            at_random(fd)
        else:
            subprocess.run(['dd', 'if=/dev/fd/%d' % fd, 'of=/dev/null', 'bs=' + read, 'status=none'], check=True, pass_fds=[fd])
        t = time.perf_counter() - t
        os.close(fd)
        return t
    finally:
        mount.stop()
        if view:
            subprocess.run(['umount', '-l', slow], check=True)
            view.wait()
        shutil.rmtree(dst)


def shown(read, times):
    each = [t / 200 * 1e3 if read == 'random' else size / t for t in times]
    form = '%.2f ms (%.2f-%.2f)' if read == 'random' else '%.0f MiB/s (%.0f-%.0f)'
    return form % (statistics.median(each), min(each), max(each))


try:
    for state in states:
        print('\nbackground %s:\n\n| source | read | %s |\n| --- | --- |%s' % (state, ' | '.join(programs), ' --- |' * len(programs)))
        for us in sources:
            for read in reads:
                got = {p: [] for p in programs}
                for _ in range(runs):
                    for p in programs:
                        got[p].append(one(p, us, read, state))
                name = '%d ms' % (us // 1000) if us else 'local'
                print('| %s | %s | %s |' % (name, read, ' | '.join(shown(read, got[p]) for p in programs)), flush=True)
finally:
    lab.remove(work)
PY
