#!/usr/bin/env python3
"""compare.py: what compare.sh runs; its head tells the workloads and the variables."""
import contextlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS, SCALE = int(os.environ.get('ROUNDS', '5')), float(os.environ.get('SCALE', '1'))
MIRRORFS, KIT = os.environ['MIRRORFS'], os.environ['MIRRORFS_KIT']
CPUS = os.cpu_count() or 1
MIB, T0 = 1 << 20, 1_500_000_000
POOL = random.Random(7).randbytes(4 * MIB)
MKFS = {'ext4': ['mkfs.ext4', '-q', '-F'], 'xfs': ['mkfs.xfs', '-q', '-f'], 'btrfs': ['mkfs.btrfs', '-q', '-f']}
TAR = "mkdir {d} && tar -C {s} --acls --xattrs --xattrs-include='*' -S -cf - . | tar -C {d} --acls --xattrs --xattrs-include='*' -xpf -"

# name -> (program that must be there, command, command for a slow or cold source)
TOOLS = {
    'mirrorfs sync': (MIRRORFS, [MIRRORFS, 'sync', '--fsync', 'never', '{s}', '{d}'], None),
    'cp -a': ('cp', ['cp', '-a', '{s}', '{d}'], None),
    'rsync -aHAX': ('rsync', ['rsync', '-aHAX', '{s}/', '{d}/'], None),
    'tar pipe': ('tar', ['sh', '-c', TAR], None),
    'xcp': ('xcp', ['xcp', '-r', '{s}', '{d}'], ['xcp', '-r', '-w', '64', '{s}', '{d}']),
    'fcp': ('fcp', ['fcp', '{s}', '{d}'], None),
    'rclone': ('rclone', ['rclone', 'copy', '--links', '--metadata', '--transfers', str(4 * CPUS), '{s}', '{d}'],
               ['rclone', 'copy', '--links', '--metadata', '--transfers', '32', '--checkers', '32', '{s}', '{d}']),
    'fpsync': ('fpsync', ['fpsync', '-n', str(CPUS), '-o', '-lptgoDHAX --numeric-ids', '{s}/', '{d}/'], None),
}
# src and dst on one file system; `shared` needs one that can share extents.
ONE_VOLUME = {'same', 'shared'}
# Left out where they take minutes and are never near.
SLOW_TOOLS = {'rclone': {'tiny', 'wide', 'links', 'sparse'}, 'fpsync': {'tiny', 'wide', 'links', 'sparse', 'slow1', 'slow5'}}


def put(path, size, rnd, owner=(0, 0), mode=0o644):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    at = rnd.randrange(len(POOL) - size) if size < len(POOL) else 0
    os.write(fd, memoryview(POOL)[at:at + size])
    os.fchown(fd, *owner)
    os.fchmod(fd, mode)
    t = (T0 + rnd.randrange(10**8)) * 10**9 + rnd.randrange(10**9)
    os.utime(fd, ns=(t, t))
    return fd


def many(root, files, ndirs, rnd):
    """Sizes log-normal around 4 KiB, owners, modes, times, some links and xattrs."""
    dirs, names = [root], []
    while len(dirs) < ndirs:
        parent = rnd.choice(dirs[-1500:] if rnd.random() < .7 else dirs)
        if parent[len(root):].count('/') < 9:
            dirs.append('%s/d%d' % (parent, len(dirs)))
            os.mkdir(dirs[-1])
    for i, d in enumerate(rnd.choices(dirs, [rnd.paretovariate(1.3) for _ in dirs], k=files)):
        size = min(MIB, int(math.exp(math.log(4096) + 1.46 * rnd.gauss(0, 1))))
        owner = rnd.choice([(0, 0)] * 6 + [(1000, 1000), (1000, 100), (33, 33)])
        names.append('%s/f%d' % (d, i))
        fd = put(names[-1], size, rnd, owner, rnd.choice([0o644] * 12 + [0o755] * 3 + [0o600]))
        if i % 200 == 0:
            os.setxattr(fd, 'user.origin', b'%d' % size)
        os.close(fd)
    for i in range(files // 200):
        os.link(rnd.choice(names), '%s/h%d' % (rnd.choice(dirs), i))
        os.symlink('f', '%s/l%d' % (rnd.choice(dirs), i))


def make(root, kind):
    rnd, n = random.Random(kind), lambda full: max(1, int(full * SCALE))
    os.mkdir(root)
    if kind in ('small', 'cold'):
        many(root, n(60_000), n(4000), rnd)
    elif kind in ('slow1', 'slow5'):
        many(root, n(5000), n(200), rnd)
    elif kind == 'tiny':
        for d in range(20):
            os.mkdir('%s/d%d' % (root, d))
        for i in range(n(200_000)):
            os.close(put('%s/d%d/f%d' % (root, i % 20, i), 0 if i % 2 else 1 + rnd.randrange(64), rnd))
    elif kind == 'links':
        for d in range(100):
            os.mkdir('%s/d%d' % (root, d))
        for i in range(n(10_000)):
            first = '%s/d%d/f%d' % (root, i % 100, i)
            os.close(put(first, i % 5000, rnd))
            for k in range(99):
                os.link(first, '%s/d%d/l%d.%d' % (root, rnd.randrange(100), i, k))
    elif kind == 'wide':
        for i in range(n(1_000_000)):
            os.close(put('%s/file number %d' % (root, i), 1 + rnd.randrange(64) if i % 10 == 0 else 0, rnd))
    elif kind == 'shared':
        many(root, n(6000), n(400), rnd)
        for i in range(n(500)):
            os.close(put('%s/m%d' % (root, i), 4 * MIB, rnd))
    elif kind in ('large', 'same'):
        for i in range(3):
            with open('%s/big%d' % (root, i), 'wb') as f:
                for _ in range(n(512) // 4 + 1):
                    f.write(POOL)
    elif kind == 'sparse':
        with open(root + '/image', 'wb') as f:
            for k in range(n(4096)):
                f.seek(k * 2 * MIB + rnd.randrange(480) * 4096)
                f.write(POOL[k * 512:][:64 << 10])
            f.truncate(n(4096) * 2 * MIB)


def everything(root):
    """One of each thing that a copy may lose."""
    os.makedirs(root + '/dir')
    rnd = random.Random(1)
    os.close(put(root + '/dir/file', 5000, rnd, (1000, 33), 0o4755))
    os.link(root + '/dir/file', root + '/second name')
    os.setxattr(root + '/dir/file', 'user.note', b'x')
    for d in ('dir', '.'):
        subprocess.run(['setfacl', '-m', 'u:1234:rwx', '%s/%s' % (root, d)], check=False)
    os.symlink('dir/file', root + '/symlink')
    os.lchown(root + '/symlink', 1000, 1000)
    os.mkfifo(root + '/fifo')
    os.mknod(root + '/device', 0o20600, os.makedev(1, 3))
    with open(root + '/holes', 'wb') as f:
        f.truncate(64 * MIB)
        f.seek(32 * MIB)
        f.write(b'data')
    for n in ('holes', 'dir', '.'):
        os.utime('%s/%s' % (root, n), ns=(T0 * 10**9 + 1, T0 * 10**9 + 1))


def losses(src, dst):
    """What treecmp.py or verify says, as a short list; the counts do not matter."""
    if os.path.exists(KIT + '/treecmp.py'):
        p = subprocess.run([sys.executable, KIT + '/treecmp.py', src, dst], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        last = p.stdout.strip().splitlines()[-1]
        kinds = re.findall(r'([a-z][a-z +-]*[a-z]) \d+', last.split(' s, ')[-1]) if p.returncode else []
    else:
        p = subprocess.run([MIRRORFS, 'verify', src, dst], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        kinds = sorted({w for line in p.stdout.splitlines() for w in line.split('": ')[-1].split(':')[:1]}) if p.returncode else []
    return ', '.join(kinds) or ('something' if p.returncode else 'nothing')


def run(command, src, dst):
    """(seconds, processor seconds, peak MiB, exit status) of one copy."""
    words = [w.format(s=src, d=dst) for w in command]
    begin = time.monotonic()
    pid = os.posix_spawnp(words[0], words, dict(os.environ, TMPDIR=os.path.dirname(dst)), file_actions=[
        (os.POSIX_SPAWN_OPEN, 1, '/dev/null', os.O_WRONLY, 0), (os.POSIX_SPAWN_OPEN, 2, '/dev/null', os.O_WRONLY, 0)])
    try:
        _, status, used = os.wait4(pid, 0)
    except BaseException:
        # Told to stop: the tool must not keep the images busy.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return time.monotonic() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, os.waitstatus_to_exitcode(status)


def unmount(at):
    for _ in range(30):
        if subprocess.run(['umount', at], stderr=subprocess.DEVNULL).returncode == 0:
            return
        time.sleep(0.1)         # a loop device that goes away later holds its image
    subprocess.run(['umount', '-l', at], check=True)


class Lab:
    """Images in memory (or on the disk), mounted; all of it goes in the end."""

    def __init__(self):
        self.top = tempfile.mkdtemp(prefix='mirrorfs-compare.')
        self.mounts, self.images = [], {}
        self.room = os.environ.get('ROOM', '12g')

    def mount(self, *words):
        subprocess.run(['mount', *words], check=True)
        self.mounts.append(words[-1])

    def volume(self, name, fs, on_disk=False):
        at = '%s/%s' % (self.top, name)
        os.makedirs(at)
        if fs == 'tmpfs':
            self.mount('-t', 'tmpfs', '-o', 'size=' + self.room, 'none', at)
            return at
        holder = self.top + '/disk' if on_disk else self.top + '/memory'
        os.makedirs(holder, exist_ok=True)
        if not on_disk and not os.path.ismount(holder):
            self.mount('-t', 'tmpfs', '-o', 'size=' + self.room, 'none', holder)
        image = '%s/%s.image' % (holder, name)
        self.images[at] = fs, image
        self.format(at)
        return at

    def format(self, at):
        fs, image = self.images[at]
        if os.path.exists(image):
            os.unlink(image)
        with open(image, 'wb') as f:
            f.truncate(16 << 30)
        subprocess.run([*MKFS[fs], image], check=True, stdout=subprocess.DEVNULL)
        self.mount('-o', 'loop', image, at)

    def renew(self, at):
        """An empty file system for each run: the traces of a deletion (inodes that ext4 will not give out again for five
        seconds, work that xfs and btrfs put off) would be paid by whoever comes next."""
        unmount(at)
        self.mounts.remove(at)
        if at in self.images:
            self.format(at)
        else:
            self.mount('-t', 'tmpfs', '-o', 'size=' + self.room, 'none', at)

    def close(self):
        for at in reversed(self.mounts):
            unmount(at)
        shutil.rmtree(self.top, ignore_errors=True)


class Slow:
    """The tree below a FUSE mount where each request takes a while; nothing of it is cached."""

    def __init__(self, lab, us):
        self.us, self.at, self.program = us, lab.top + '/slow', os.environ.get('SLOWFS') or lab.top + '/slowfs'
        os.makedirs(self.at, exist_ok=True)
        if os.environ.get('SLOWFS'):
            return
        flags = subprocess.run(['pkg-config', '--cflags', '--libs', 'fuse3'], stdout=subprocess.PIPE, text=True).stdout.split()
        subprocess.run(['gcc', '-O2', '-o', self.program, KIT + '/slowfs.c', *flags, '-lpthread'], check=True)

    @contextlib.contextmanager
    def serving(self, src, said=None):
        """`said`, a list, takes the numbers of requests by kind, as the source counts them."""
        server = subprocess.Popen([self.program, src, self.at, 'us=%d' % self.us], stderr=subprocess.DEVNULL if said is None else subprocess.PIPE, text=True)
        try:
            while not os.path.ismount(self.at):
                if server.poll() is not None:
                    sys.exit('compare.py: slowfs did not start')
                time.sleep(0.02)
            yield self.at
        finally:
            if said is not None:
                server.send_signal(signal.SIGUSR1)
                said.append(server.stderr.readline())
            subprocess.run(['umount', self.at])
            server.wait()

    def __call__(self, src, command, dst):
        with self.serving(src) as slow:
            return run(command, slow, dst)


def warm(src):
    subprocess.run(['sh', '-c', 'tar -C "$1" -cf - . | cat >/dev/null', 'sh', src], check=True)


def cold(src):
    """Forgets what is cached of one file system, without touching anybody else's cache."""
    at = os.path.dirname(src)
    image = subprocess.run(['findmnt', '-no', 'SOURCE', at], stdout=subprocess.PIPE, text=True).stdout.strip()
    file = subprocess.run(['losetup', '-nO', 'BACK-FILE', image], stdout=subprocess.PIPE, text=True).stdout.strip()
    subprocess.run(['umount', at], check=True)
    with open(file, 'rb') as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    subprocess.run(['mount', '-o', 'loop', file, at], check=True)
    # Else one thread of the kernel serves the image, one request after the other, as no disk does.
    image = subprocess.run(['findmnt', '-no', 'SOURCE', at], stdout=subprocess.PIPE, text=True).stdout.strip()
    subprocess.run(['losetup', '--direct-io=on', image], check=True)


def workload(kind, fs, tools, lost):
    lab = Lab()
    try:
        slow = int(kind[4:]) if kind.startswith('slow') else 0
        at = lab.volume('src', 'ext4' if slow else fs, on_disk=kind == 'cold')
        to = at if kind in ONE_VOLUME else lab.volume('dst', fs)
        src, dst = at + '/tree', to + '/copy'
        make(src, kind)
        os.sync()
        server = Slow(lab, slow * 1000) if slow else None
        results = {t: [] for t in tools if kind not in SLOW_TOOLS.get(t, ())}
        for _ in range(ROUNDS):
            for tool in results:
                if to == at:
                    shutil.rmtree(dst, ignore_errors=True)
                else:
                    lab.renew(to)
                os.sync()
                _, command, patient = TOOLS[tool]
                if slow:
                    results[tool].append(server(src, patient or command, dst))
                else:
                    (cold if kind == 'cold' else warm)(src)
                    results[tool].append(run(patient or command if kind == 'cold' else command, src, dst))
        calls = calls_per_entry(src, dst) if kind == 'small' else None
        return table(kind, fs, results, lost, calls)
    finally:
        lab.close()


def calls_per_entry(src, dst):
    if not shutil.which('strace'):
        return None
    shutil.rmtree(dst, ignore_errors=True)
    log = dst + '.calls'
    subprocess.run(['strace', '-f', '-c', '-o', log, MIRRORFS, 'sync', '--fsync', 'never', src, dst], stderr=subprocess.DEVNULL)
    total = [line.split() for line in open(log) if line.rstrip().endswith('total')]
    entries = int(subprocess.run(['sh', '-c', 'find "$1" | wc -l', 'sh', src], stdout=subprocess.PIPE, text=True).stdout)
    os.unlink(log)
    # % time, seconds, usecs/call, calls, errors, "total"
    return int(total[0][3]) / entries if total else None


def table(kind, fs, results, lost, calls):
    rows, mid = [], lambda tool, i: statistics.median(r[i] for r in results[tool])
    ours = mid('mirrorfs sync', 0) if 'mirrorfs sync' in results else math.nan
    print('\n### %s, %s\n\n| tool | clock s | min-max | ours / it | processor s | peak MiB | loses |\n| --- | --- | --- | --- | --- | --- | --- |' % (kind, fs))
    for tool in results:
        walls = [r[0] for r in results[tool]]
        failed = sorted({r[3] for r in results[tool]} - {0})
        note = lost.get(tool, '?') + (' (exit %s)' % failed if failed else '')
        peak = max(r[2] for r in results[tool])
        # The kernel counts from before the exec: what is less than this script cannot be told.
        floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print('| %s | %.2f | %.2f-%.2f | %.2f | %.2f | %s%.0f | %s |' % (
            tool, mid(tool, 0), min(walls), max(walls), ours / mid(tool, 0), mid(tool, 1), '<= ' if peak <= floor + 1 else '', peak, note))
        rows.append({'workload': kind, 'fs': fs, 'tool': tool, 'rounds': ROUNDS, 'scale': SCALE, 'clock_s': walls,
                     'cpu_s': [r[1] for r in results[tool]], 'peak_mib': max(r[2] for r in results[tool]),
                     'exit': [r[3] for r in results[tool]], 'loses': lost.get(tool), 'calls_per_entry': calls if tool == 'mirrorfs sync' else None})
    if calls:
        print('\nmirrorfs sync: %.1f system calls for each entry' % calls)
    sys.stdout.flush()
    return rows


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kinds = sys.argv[1:] or ['small', 'tiny', 'wide', 'links', 'large', 'same', 'shared', 'sparse', 'cold', 'slow1', 'slow5']
    wanted = os.environ.get('TOOLS', '').split()
    tools = [t for t, (program, _, _) in TOOLS.items() if shutil.which(program) and (not wanted or t.split()[0] in wanted)]
    lab, lost = Lab(), {}
    try:
        at = lab.volume('check', 'ext4')
        everything(at + '/src')
        for tool in tools:
            run(TOOLS[tool][1], at + '/src', at + '/dst')
            lost[tool] = losses(at + '/src', at + '/dst')
            subprocess.run(['rm', '-rf', at + '/dst'], check=True)
    finally:
        lab.close()
    rows = []
    for kind in kinds:
        if kind.startswith('slow') and not os.path.exists(KIT + '/slowfs.c'):
            print('%s: skipped: no slowfs.c (MIRRORFS_KIT)' % kind)
            continue
        for fs in os.environ.get('FS', 'ext4').split():
            if (kind == 'cold' and fs == 'tmpfs') or (kind == 'shared' and fs not in ('xfs', 'btrfs')):
                continue
            rows += workload(kind, fs, tools, lost)
            with open(os.environ['OUT'], 'w') as f:
                json.dump(rows, f, indent=1)
    print('\nmedians of %d rounds in turn; results: %s' % (ROUNDS, os.environ['OUT']))


if __name__ == '__main__':
    main()
