#!/usr/bin/env bash
# offline.sh [RUNS] - for how long users are offline at the end of a migration: the rsync way and ours, on the same tree.
# As root. SRC (ext4) was copied days ahead, to one DST (xfs) by `rsync -aHAXS --delete`, to another by `mirrorfs sync --delete`.
# In each of RUNS (default 5) rounds users change one file in a thousand, remove some, make some; then they stop, and
#   rsync     the last `rsync -aHAXS --delete`, until it ends
#   mirrorfs  `mirrorfs mount --adopt --delete`, until it returns, the root is listed and a changed file was read; the
#             rest follows while they work: that time is told too
# with cold caches (COLD=no: warm ones). Prints the medians and all values, and verifies both copies at the end.
# FILES=100000 makes the tree smaller, DIR=/somewhere puts it elsewhere, MIRRORFS=... is the program.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/bench/lab.sh
. "$here/lab.sh"
need rsync rsync
need mkfs.xfs xfsprogs
exec python3 - "$here" "${1:-5}" <<'PY'
import atexit, os, random, statistics, subprocess, sys, time
here, runs = sys.argv[1], int(sys.argv[2])
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(here, '../crash'))
import lab

files = int(os.environ.get('FILES', 100_000))
cold = os.environ.get('COLD', 'yes') != 'no'
if 'DIR' in os.environ:
    os.environ['TMPDIR'] = os.environ['DIR']
lab.own_namespace()
work = lab.scratch('mirrorfs-offline.')
atexit.register(lab.remove, work)
chance = random.Random(1)
RSYNC = ['rsync', '-aHAXS', '--delete', '--modify-window=-1']  # To the nanosecond, as ours.


def call(*cmd):
    begin = time.perf_counter()
    done = subprocess.run(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    if done.returncode:
        raise SystemExit('%s: %d: %s' % (' '.join(cmd), done.returncode, done.stdout.decode(errors='replace')[-2000:]))
    return time.perf_counter() - begin, done.stdout


def fs(name, kind):
    image, at = '%s/%s.img' % (work, name), '%s/%s' % (work, name)
    with open(image, 'wb') as f:
        f.truncate(20 << 30)
    os.mkdir(at)
    call('mkfs.' + kind, *(['-q', '-F'] if kind == 'ext4' else ['-q']), image)
    call('mount', '-o', 'loop', image, at)
    os.mkdir(at + '/tree')
    return at + '/tree'


def path(n):
    return '%s/d%02d/e%02d/f%04d' % (src, n // 10000, n // 100 % 100, n % 100)


def write(n):
    size = 1 + int(chance.paretovariate(1.1) * 900) % 300_000
    with open(path(n), 'wb') as f:
        f.write(chance.randbytes(size))


def change(round):
    changed = chance.sample(range(files), files // 1000)
    for n in changed:
        if os.path.exists(path(n)):
            write(n)
    for n in chance.sample(range(files), files // 10000):
        if os.path.exists(path(n)) and n not in changed:
            os.unlink(path(n))
    for n in range(files // 10000):
        write(files + round * 1000 + n)
    os.sync()
    return path(changed[0])[len(src):]


def calm():
    os.sync()
    if cold:
        with open('/proc/sys/vm/drop_caches', 'w') as f:
            f.write('3')


src, by_rsync, ours = fs('src', 'ext4'), fs('rsync', 'xfs'), fs('ours', 'xfs')
begin = time.time()
for n in range(files + 1000 * (runs + 1)):
    if n % 100 == 0:
        os.makedirs(os.path.dirname(path(n)), exist_ok=True)
    if n < files:
        write(n)
os.sync()
_, size = call('du', '-sk', src)
print('tree: %d files, %.1f GiB, %.0f s to make' % (files, int(size.split()[0]) / 2**20, time.time() - begin))
first = {'rsync': call(*RSYNC, src + '/', by_rsync + '/')[0], 'mirrorfs': call(lab.binary(), 'sync', '--delete', src, ours)[0]}
print('first copy, users at work: rsync %.1f s, mirrorfs sync %.1f s' % (first['rsync'], first['mirrorfs']))
got = {}


def add(what, seconds):
    got.setdefault(what, []).append(seconds)


for round in range(runs):
    name = change(round)
    for way in (['rsync', 'ours'] if round % 2 else ['ours', 'rsync']):
        calm()
        if way == 'rsync':
            add('rsync: the last pass', call(*RSYNC, src + '/', by_rsync + '/')[0])
            continue
        begin = time.perf_counter()
        call(lab.binary(), 'mount', '--adopt', '--delete', src, ours)
        add('mirrorfs: mount returned', time.perf_counter() - begin)
        os.listdir(ours)
        with open(ours + name, 'rb') as f:
            body = f.read()
        add('mirrorfs: users are back', time.perf_counter() - begin)
        with open(src + name, 'rb') as f:
            assert f.read() == body
        call(lab.binary(), 'wait', ours, '--timeout', '600s')
        add('mirrorfs: all is there (users work)', time.perf_counter() - begin)
        call(lab.binary(), 'finish', ours)
for what, values in got.items():
    print('%-38s %7.2f s  (%s)' % (what, statistics.median(values), ' '.join('%.2f' % v for v in sorted(values))))
ratio = statistics.median(got['rsync: the last pass']) / statistics.median(got['mirrorfs: users are back'])
print('users are offline %.0f times shorter' % ratio)
for dst in (by_rsync, ours):
    print(call(lab.binary(), 'verify', src, dst)[1].decode().strip())
PY
