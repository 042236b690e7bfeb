#!/usr/bin/env bash
# clients.sh [RUNS] - many clients at once in a hydrated tree of which nothing is cached, on a dst whose disk takes long. As root.
# The disk is slowdisk.c (gcc, libfuse3-dev): US=2000 microseconds for each read, any number at once. CLIENTS=16 processes each
# list DIRS=40 directories of their own and read the file in each. RUNS (default 5) times in turn natively, with --transport dev
# and uring, and with each of EXTRA="-o threads=2;-o threads=32" besides; prints medians and their ratios to native.
# DIR=/somewhere puts the trees elsewhere, MIRRORFS=... is the program.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec python3 - "$here" "${1:-5}" <<'PY'
import os, statistics, subprocess, sys, time
here, runs = sys.argv[1], int(sys.argv[2])
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(here, '../crash'))
import lab

us, clients, dirs = (int(os.environ.get(k, v)) for k, v in (('US', 2000), ('CLIENTS', 16), ('DIRS', 40)))
if 'DIR' in os.environ:
    os.environ['TMPDIR'] = os.environ['DIR']
lab.own_namespace()
work = lab.scratch('mirrorfs-bench.')
src, dst, at, slow = (work + '/' + x for x in ('src', 'dst', 'at', 'slow'))
CLIENT = '''
import os, sys
at, first, step, end = sys.argv[1], *map(int, sys.argv[2:])
sys.stdin.readline()
for d in range(first, end, step):
    for name in os.listdir('%s/d%d' % (at, d)):
        with open('%s/d%d/%s' % (at, d, name), 'rb', 0) as f:
            assert len(f.read()) == 100
'''


def sh(line):
    return subprocess.run(line, shell=True, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def make():
    """A dst on which everything is done, in an image."""
    for d in (dst, at, slow):
        os.makedirs(d)
    for d in range(clients * dirs):
        os.makedirs('%s/d%d' % (src, d))
        with open('%s/d%d/f' % (src, d), 'wb') as f:
            f.write(b'x' * 100)
    sh('truncate -s 2G %s/image; mkfs.ext4 -q -F %s/image; mount -o loop %s/image %s' % (work, work, work, dst))
    m = lab.Mount(src, dst, at, work + '/log', ['--transport', 'dev'])
    m.wait_complete()
    m.stop()
    sh('umount ' + dst)


def once(args):
    """Seconds until all clients are done; `args`: the mount's, or None: natively."""
    # One inode block for each read: with readahead ext4 hides what is measured.
    loop = sh('losetup -f --show --direct-io=on %s/disk' % slow)
    sh('mount -o inode_readahead_blks=1 %s %s' % (loop, dst))
    m = None if args is None else lab.Mount(src, dst, at, work + '/log', ['--no-background', *args])
    with open('/proc/sys/vm/drop_caches', 'w') as f:
        f.write('3')
    ps = [subprocess.Popen([sys.executable, '-c', CLIENT, at if m else dst, str(n), str(clients), str(clients * dirs)],
                           stdin=subprocess.PIPE) for n in range(clients)]
    time.sleep(1)       # Until all are there.
    begin = time.perf_counter()
    for p in ps:
        p.stdin.close()
    codes = [p.wait() for p in ps]
    took = time.perf_counter() - begin
    if any(codes):
        raise SystemExit('a client failed')
    if m:
        m.stop()
    sh('umount %s; losetup -d %s' % (dst, loop))
    return took


make()
sh('${CC:-cc} -O2 -o %s/slowdisk %s/slowdisk.c $(pkg-config --cflags --libs fuse3)' % (work, here))
disk = subprocess.Popen([work + '/slowdisk', work + '/image', slow, str(us)])
end = time.monotonic() + 20
while not lab.mounted_at(slow):
    if disk.poll() is not None or time.monotonic() > end:
        raise SystemExit('slowdisk did not start')
    time.sleep(0.01)
ways = {'native': None, '--transport dev': ['--transport', 'dev'], '--transport uring': ['--transport', 'uring']}
ways |= {more: more.split() for more in os.environ.get('EXTRA', '').split(';') if more}
seconds = {way: [] for way in ways}
try:
    for _ in range(runs):
        for way, args in ways.items():
            seconds[way].append(once(args))
finally:
    disk.terminate()
native = statistics.median(seconds['native'])
print('| %d clients, %d us for each read | s (min-max) | x native |\n| --- | --- | --- |' % (clients, us))
for way, all_ in seconds.items():
    mid = statistics.median(all_)
    print('| %s | %.2f (%.2f-%.2f) | %.2f |' % (way, mid, min(all_), max(all_), mid / native))
PY
