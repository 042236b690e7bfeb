#!/usr/bin/env bash
# mount.sh [ROUNDS] - a hydrated tree behind the mount, beside the native file system and other layers over it. As root.
# In each of ROUNDS (default 5) rounds every contestant does every workload, in turn: native; mirrorfs with --transport dev and
# uring; bindfs, fuse-overlayfs and kernel overlayfs over the native tree, and libfuse's passthrough_hp when
# PASSTHROUGH_HP=/its/program is given (example/passthrough_hp.cc of libfuse). Prints medians, and in brackets the speed over
# native's. WORKLOADS="stat tar" and ONLY="native uring" choose; DIR=/somewhere puts the trees elsewhere (a local disk);
# SECONDS=0.2 is how long each loop runs; CPU=0 keeps whoever asks on that processor (a virtual
# one that is idle takes long to wake); OUT=file.json takes all values; MIRRORFS=... is the program.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec python3 - "$here" "${1:-5}" <<'PY'
import json, os, shutil, statistics, subprocess, sys, time
here, rounds = sys.argv[1], int(sys.argv[2])
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(here, '../crash'))
import lab

if 'DIR' in os.environ:
    os.environ['TMPDIR'] = os.environ['DIR']
lab.own_namespace()
work = lab.scratch('mirrorfs-bench.')
seconds = os.environ.get('SECONDS', '0.2')
SMALL, BIG = 20_000, 64 << 20
LOOPS = {'stat': 'stat, warm', 'ask': 'stat, asked for', 'open': 'open, read 4 KiB, close', 'create': 'create 4 KiB, unlink',
         'read': 'read 1 MiB', 'write': 'write 1 MiB', 'random': 'read 4 KiB, random', 'mmap': 'mmap 64 MiB, touch'}
COMMANDS = {'tar': ('tar of 20,000 files', 'tar cf - small | cat >/dev/null'), 'find': ('find', 'find small >/dev/null'),
            'ls': ('ls -lR, warm', 'ls -lR small >/dev/null'), 'lscold': ('ls -lR, cold', 'ls -lR small >/dev/null'),
            'git': ('git status', 'git -C git -c safe.directory=* status >/dev/null')}
tree = work + '/native'
pinned = ['taskset', '-c', os.environ['CPU']] if 'CPU' in os.environ else []


def sh(line, cwd=None):
    # pipefail: a tar that reads nothing is no fast one.
    subprocess.run([*pinned, 'bash', '-o', 'pipefail', '-c', line], check=True, cwd=cwd, timeout=120, stderr=subprocess.PIPE)


def make():
    os.makedirs(tree + '/files')
    for n in range(1000):
        with open('%s/files/%d' % (tree, n), 'wb') as f:
            f.write(os.urandom(4096))
    for d in range(SMALL // 100):
        os.makedirs('%s/small/d%03d' % (tree, d))
        for n in range(100):
            with open('%s/small/d%03d/f%02d' % (tree, d, n), 'wb') as f:
                f.write(os.urandom(100 + (d * 37 + n * 911) % 4000))
    with open(tree + '/big', 'wb') as f:
        f.write(os.urandom(BIG))
    shutil.copytree(tree + '/small', tree + '/git', ignore=lambda at, names: names[:len(names) * 3 // 4] if 'd' in at[-4:] else [])
    sh('git init -q . && git add . && git -c user.name=x -c user.email=x@x commit -qm x && git status >/dev/null', tree + '/git')
    os.sync()


def mirror(transport):
    dst, at = work + '/dst-' + transport, work + '/at-' + transport
    os.makedirs(dst)
    os.makedirs(at)
    m = lab.Mount(tree, dst, at, work + '/log-' + transport, ['--transport', transport])
    m.wait_complete()
    log = open(work + '/log-' + transport).read()
    if transport == 'uring' and 'requests come through io_uring' not in log:
        print('uring: not here; /dev/fuse serves', file=sys.stderr)
    return at, m.stop


def layer(name, line):
    at = work + '/at-' + name
    for d in (at, work + '/up-' + name, work + '/wk-' + name):
        os.makedirs(d)
    words = [w.format(low=tree, up=work + '/up-' + name, wk=work + '/wk-' + name, at=at) for w in line.split()]
    if not shutil.which(words[0]):
        return None
    p = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 10
    while not os.path.exists(at + '/big') and time.time() < end:
        time.sleep(0.05)
    if not os.path.exists(at + '/big'):
        print(name + ': could not be mounted', file=sys.stderr)
        return None

    def stop():
        subprocess.run(['umount', '-l', at])
        p.wait(timeout=20)
    return at, stop


def contestants():
    hp = os.environ.get('PASSTHROUGH_HP', 'passthrough_hp')
    over = 'lowerdir={low},upperdir={up},workdir={wk}'
    yield 'native', lambda: (tree, lambda: None)
    yield 'dev', lambda: mirror('dev')
    yield 'uring', lambda: mirror('uring')
    yield 'bindfs', lambda: layer('bindfs', 'bindfs -f {low} {at}')
    yield 'passthrough_hp', lambda: layer('passthrough_hp', hp + ' --foreground {low} {at}')
    yield 'fuse-overlayfs', lambda: layer('fuse-overlayfs', 'fuse-overlayfs -f -o ' + over + ' {at}')
    yield 'overlayfs', lambda: layer('overlayfs', 'mount -t overlay overlay -o ' + over + ' {at}')


def cache_alike(ats):
    """What each has cached of `big` came by the same reads: how it was written decides how large the pieces (folios) are that
    the kernel has of it, and that the speed of mmap."""
    os.sync()
    with open('/proc/sys/vm/drop_caches', 'w') as f:
        f.write('1')
    for at in ats:
        sh('cat big >/dev/null', at)


def once(what, at):
    """A speed: more is better."""
    if what in LOOPS:
        out = subprocess.run([*pinned, work + '/mount', what, at, seconds], check=True, timeout=60, stdout=subprocess.PIPE).stdout
        return float(out)
    if what == 'lscold':
        with open('/proc/sys/vm/drop_caches', 'w') as f:
            f.write('2')        # Names and inodes; the data of directories stays cached.
    t = time.perf_counter()
    sh(COMMANDS[what][1], at)
    return 1 / (time.perf_counter() - t)


sh('${CC:-cc} -O2 -o %s/mount %s/mount.c' % (work, here))
make()
only = os.environ.get('ONLY', '').split()
there = {}
for name, start in contestants():
    if not only or name in only:
        made = start()
        if made:
            there[name] = made
cache_alike([at for at, _ in there.values()])
workloads = os.environ.get('WORKLOADS', '').split() or [*LOOPS, *COMMANDS]
values = {w: {n: [] for n in there} for w in workloads}
try:
    for what in workloads:
        for name, (at, _) in there.items():
            try:
                once(what, at)                          # Warm.
            except subprocess.CalledProcessError as e:  # passthrough_hp: an fd for each inode, and they have run out.
                print('%s: %s: %s' % (name, what, (e.stderr or b'')[-200:].decode(errors='replace')), file=sys.stderr)
                del values[what][name]
    for r in range(rounds):
        for what in workloads:
            for name in (list(values[what]) if r % 2 else list(values[what])[::-1]):
                values[what][name].append(once(what, there[name][0]))
finally:
    for at, stop in there.values():
        stop()
    lab.remove(work)
print('| workload | ' + ' | '.join(there) + ' |')
print('| --- |' + ' --- |' * len(there))
for what in workloads:
    cells = []
    native = statistics.median(values[what]['native']) if 'native' in there else None
    for name in there:
        if name not in values[what]:
            cells.append('-')
            continue
        m = statistics.median(values[what][name])
        text = '%.0f/s' % m if what in LOOPS else '%.3f s' % (1 / m)
        cells.append(text if name == 'native' or not native else '%s (%.2f)' % (text, m / native))
    print('| %s | %s |' % (LOOPS.get(what) or COMMANDS[what][0], ' | '.join(cells)))
if 'OUT' in os.environ:
    with open(os.environ['OUT'], 'w') as f:
        json.dump(values, f)
PY
