"""What the crash scripts share: a src tree, a mount of the program, an independent comparer.

Nothing here asks the program what it thinks: trees are compared entry by entry with os calls.
"""
import ctypes
import errno
import glob
import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

# A build with the `fault` feature takes small directories in several parts too.
os.environ.setdefault('MIRRORFS_FAULT_CHUNK', '16')
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
T0 = 1_400_000_000 * 10**9
MARKS = ('trusted.mirrorfs', 'user.mirrorfs')
CONTROL = '.mirrorfs'
# What a request gets when the daemon dies under it.
DEAD = (errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED, errno.EIO, errno.ESHUTDOWN, errno.EINTR)
# Where a daemon of a mount that is kept may be killed: a point of src/sys/fault.rs, and at which passage.
KILL_AT = os.environ.get('KILL_AT', ' '.join('%s:%d' % (p, n) for n in (1, 1, 2, 5, 17) for p in (
    'act-begun act-done open-written create-written left-taken hydrate-begin hydrate-landed hydrate-durable hydrate-unmarked '
    'ahead-placed own-made own-marked own-linked populate-before-mark populate-after-mark publish-durable publish-marked dir-unmark '
    'rename-origin rename-done carry-written mixed-map mixed-marked mixed-mature mixed-claimed mixed-written mixed-synced '
    'mixed-promoted mixed-cut mixed-punched salvage-map salvage-marked salvage-synced salvage-kept salvage-owned').split()))
libc = ctypes.CDLL(None, use_errno=True)


def die(text):
    print(text, file=sys.stderr)
    sys.exit(2)


def main(doc, prepare, write, check):
    """`prepare LAB`, `write LAB` or `check LAB`, as powercut.sh calls it."""
    parts = {'prepare': prepare, 'write': write, 'check': check}
    if len(sys.argv) != 3 or sys.argv[1] not in parts:
        die(doc)
    sys.exit(parts[sys.argv[1]](os.path.abspath(sys.argv[2])))


def binary():
    """The program: $MIRRORFS, or the newest build in the target directory."""
    if 'MIRRORFS' in os.environ:
        return os.environ['MIRRORFS']
    target = os.environ.get('CARGO_TARGET_DIR', ROOT + '/target')
    built = [p for p in (target + '/release/mirrorfs', target + '/debug/mirrorfs') if os.path.exists(p)]
    if not built:
        die('no mirrorfs: build it (cargo build --release) or set MIRRORFS')
    return max(built, key=os.path.getmtime)


def kit(tool):
    """A tool of the test kit, or None."""
    path = os.path.join(os.environ.get('MIRRORFS_KIT', os.path.join(ROOT, '../shared/kit')), tool)
    return path if os.path.exists(path) else None


def own_namespace():
    """A mount namespace of our own: our mounts and loop devices go when we go. What others have
    mounted on loop devices or by FUSE is let go of, so that it is not kept busy by us."""
    if libc.unshare(0x20000) or libc.mount(b'none', b'/', None, 0x4000 | 0x40000, None):
        die('no mount namespace: ' + os.strerror(ctypes.get_errno()))
    keep = (os.getcwd(), ROOT, os.environ.get('TMPDIR', '/tmp'))
    for line in open('/proc/self/mountinfo'):
        left, _, right = line.partition(' - ')
        at, kind, source = left.split()[4], *right.split()[:2]
        foreign = source.startswith('/dev/loop') or kind.startswith('fuse')
        if foreign and not any(k == at or k.startswith(at + '/') for k in keep):
            libc.umount2(os.fsencode(at), 2)


def mounted_at(path):
    """True when the mount on top at a path is a FUSE mount. Never touches the mount."""
    found = False
    for line in open('/proc/self/mountinfo'):
        left, _, right = line.partition(' - ')
        if left.split()[4] == path:
            found = right.startswith('fuse')
    return found


def make_fs(kind, work, size=2 << 30):
    """A new file system in a sparse image, mounted; or a plain directory (kind dir)."""
    at = work + '/fs'
    os.makedirs(at)
    if kind != 'dir':
        options = {'ext4': ['-q', '-F', '-E', 'nodiscard'], 'xfs': ['-q', '-f', '-K'], 'btrfs': ['-q', '-f', '-K']}
        with open(work + '/image', 'wb') as f:
            f.truncate(size)
        subprocess.run(['mkfs.' + kind, *options[kind], work + '/image'], check=True)
        subprocess.run(['mount', '-o', 'loop', work + '/image', at], check=True)
    return at


class Mount:
    """`mirrorfs mount -f`, watched. While `keep` is set its daemons are killed again and again, and others go on."""
    keep = False

    def __init__(self, src, dst, at, log, args=(), wait=60):
        self.at, self.killer, env = at, None, dict(os.environ)
        lost = strays(dst)
        if lost:
            raise RuntimeError('pending below a directory that is done: ' + ', '.join(lost[:5]))
        if self.keep:
            args = [*args, '--keep-mount', '--transport', 'dev']
            env.update(MIRRORFS_FAULT=random.choice(KILL_AT.split()), MIRRORFS_FAULT_KILL=log + '.killed')
        with open(log, 'ab') as out:
            self.proc = subprocess.Popen([binary(), 'mount', '-f', *args, src, dst, at], stdin=subprocess.DEVNULL,
                                         stdout=out, stderr=out, env=env, preexec_fn=lambda: libc.prctl(1, signal.SIGKILL))
        self.log = log
        if wait:
            self.wait_ready(wait)
        if self.keep:
            self.killer = Killer(self.proc.pid, log + '.killed')

    def ready(self):
        # A dead mount may still be there, and its device number may be the next one's: only statfs always asks.
        # In this order: where statfs works the dead one is gone.
        try:
            os.statvfs(self.at)
            return mounted_at(self.at)
        except OSError as e:
            if e.errno not in DEAD:
                raise
            return False

    def wait_ready(self, limit):
        end = time.monotonic() + limit
        while not self.ready():
            if self.proc.poll() is not None:
                raise RuntimeError('mount ended with %d: %s' % (self.proc.returncode, self.tail()))
            if time.monotonic() > end:
                self.kill()
                raise RuntimeError('no mount after %d s: %s' % (limit, self.tail()))
            time.sleep(0.002)

    def tail(self):
        return open(self.log, errors='replace').read()[-1500:]

    def kill(self):
        self.spare()
        if self.proc.poll() is None:
            # A keeper that is stopped makes no other daemon.
            self.proc.send_signal(signal.SIGSTOP)
            daemons = children(self.proc.pid)
            for pid in [*daemons, self.proc.pid]:
                sigkill(pid)
            self.proc.wait()
            # They share what holds dst's lock.
            while any(map(is_alive, daemons)):
                time.sleep(0.002)
        self.proc.wait()

    def spare(self):
        """From here on the daemon lives."""
        if self.killer:
            self.killer.end()
        self.killer = None

    def status(self):
        return ask('status', self.at, '--json')

    def wait_complete(self, limit=120):
        import json
        end = time.monotonic() + limit
        while True:
            rc, out = self.status()
            state = json.loads(out) if rc == 0 else {}
            state = state[0] if isinstance(state, list) else state
            if state.get('state') == 'COMPLETE':
                return
            if state.get('errors'):
                raise RuntimeError('errors: ' + ask('errors', self.at, '--json')[1])
            if time.monotonic() > end:
                raise RuntimeError('not COMPLETE after %d s: %s' % (limit, out))
            time.sleep(0.03)

    def finish(self, limit=60):
        self.wait_complete()
        self.spare()
        rc, out = ask('finish', self.at)
        if rc:
            raise RuntimeError('finish: exit %d: %s' % (rc, out))
        try:
            self.proc.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError('the daemon is still there after finish')

    def stop(self):
        """Away with it, whatever it does."""
        self.spare()
        while mounted_at(self.at) and libc.umount2(os.fsencode(self.at), 2) == 0:
            pass
        try:
            self.proc.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()


class Kept(Mount):
    """`mirrorfs mount -f --keep-mount`: `proc` is the keeper, the daemon is its child."""

    def __init__(self, src, dst, at, log, args=(), wait=60):
        super().__init__(src, dst, at, log, ['--keep-mount', *args], wait)

    def kill_daemon(self, limit=60):
        """The mount lives on. False: the keeper has ended."""
        end = time.monotonic() + limit
        while self.proc.poll() is None:
            for pid in children(self.proc.pid):
                sigkill(pid)
                return True
            if time.monotonic() > end:
                raise RuntimeError('no daemon after %d s: %s' % (limit, self.tail()))
            time.sleep(0.001)
        return False


class Writer:
    """What the writer of a power cut has: a mount, promises, and an end by SIGTERM. `also` is called at the end."""

    def __init__(self, also=lambda: None):
        self.mount, self.also, self.lock = None, also, threading.Lock()
        Mount.keep = bool(os.environ.get('KEEP'))
        self.ack = open(os.environ['ACK'], 'w')
        if os.environ.get('NOISE'):
            Beside(noise(os.environ['DST']))
        signal.signal(signal.SIGTERM, self.end)

    def promise(self, *words):
        with self.lock:
            self.ack.write(' '.join(str(w) for w in words) + '\n')
            self.ack.flush()

    def end(self, *_):
        self.also()
        if self.mount:
            self.mount.kill()
            self.mount.stop()
        os._exit(0)


class Beside:
    """Does something all the time, in a thread of its own."""

    def __init__(self, act):
        self.over, self.thread = False, threading.Thread(target=self.run, args=(act,), daemon=True)
        self.thread.start()

    def run(self, act):
        while not self.over:
            act()

    def end(self):
        self.over = True
        self.thread.join()


def sigkill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass                            # It has ended.


def state_and_parent(pid):
    """Of a process; None when it is gone."""
    try:
        words = open('/proc/%s/stat' % pid).read().rpartition(')')[2].split()
    except OSError:
        return None
    return words[0], int(words[1])


def is_alive(pid):
    """Its first thread may be a zombie while others still hold its files."""
    found = state_and_parent(pid)
    return found is not None and (found[0] not in 'ZX' or len(glob.glob('/proc/%d/task/*' % pid)) > 1)


def children(pid):
    """The processes that it has made."""
    all_ = [int(p.split('/')[2]) for p in glob.glob('/proc/[0-9]*')]
    return [p for p in all_ if (state_and_parent(p) or ' 0')[1] == pid]


class Killer(Beside):
    """Kills the daemon of a mount that is kept, at random moments. A daemon of a build with the `fault` feature also kills itself,
    once, at the point of KILL_AT that was chosen for its mount: which is always in the middle of something."""

    def __init__(self, keeper, marker):
        self.keeper, self.marker, self.deaths = keeper, marker, 0
        super().__init__(self.act)

    def act(self):
        # Twenty that are killed right after their start, and the keeper gives up.
        rest = 5.5 if self.deaths % 8 == 7 else random.choice([0.05, 0.3, 1, 2]) * random.random()
        end = time.monotonic() + rest
        while time.monotonic() < end:
            if self.over:
                return
            time.sleep(0.005)
        for pid in children(self.keeper):
            if os.path.exists(self.marker):
                os.unlink(self.marker)
            sigkill(pid)
            self.deaths += 1


def noise(disk):
    """For `Beside`: somebody else has the journal of the disk committed all the time."""
    fd = os.open(disk + '/noise', os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def act():
        os.write(fd, b'.' * 100)
        os.fsync(fd)
        time.sleep(0.002)
    return act


def promised():
    """The words of each promise that was told whole."""
    for line in open(os.environ['ACKED'], errors='replace'):
        if line.endswith('\n') and line.strip():
            yield line.split()


def latest(pairs):
    """The greatest number of each key."""
    best = {}
    for key, n in pairs:
        best[key] = max(best.get(key, -1), int(n))
    return best


def migrations(dst):
    """The numbers of $DST/dst0, dst1 ... that are there."""
    return sorted(int(os.path.basename(p)[3:]) for p in glob.glob(dst + '/dst*'))


def ask(*args):
    p = subprocess.run([binary(), *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       text=True, errors='replace', timeout=120)
    return p.returncode, p.stdout


def data(tag, n):
    return hashlib.shake_128(str(tag).encode()).digest(n)


def fill_src(src, seed, tops, files, big=2):
    """An ordinary tree with links and some large files; the same seed gives the same."""
    for t in range(tops):
        for k in range(4):
            os.makedirs('%s/t%d/d%d/e' % (src, t, k))
        for i in range(files):
            tag = '%s/%d/%d' % (seed, t, i)
            d = '%s/t%d/d%d%s' % (src, t, i % 4, '/e' if i % 3 == 0 else '')
            size = int.from_bytes(data(tag + 'size', 2), 'little')
            size = [size % 5000, size % 5000, size % 60000, 70000 + size * 8][i * 7919 % 4]
            with open('%s/f%d' % (d, i), 'wb') as f:
                f.write(data(tag, size))
            os.chmod('%s/f%d' % (d, i), [0o644, 0o600, 0o755, 0o640][i % 4])
            if i % 5 == 0:
                os.setxattr('%s/f%d' % (d, i), 'user.tag', tag.encode())
            if i % 11 == 0:
                os.link('%s/f%d' % (d, i), '%s/t%d/d%d/link%d' % (src, t, (i + 1) % 4, i))
            if i % 13 == 0:
                os.symlink('f%d' % i, '%s/sym%d' % (d, i))
        for i in range(big):
            with open('%s/t%d/big%d' % (src, t, i), 'wb') as f:
                f.write(data('%s/%d/big%d' % (seed, t, i), 9 << 20))
                f.seek(3 << 20, 1)
                f.write(b'the end after a hole')
    for top, dirs, names in os.walk(src, topdown=False):
        for i, n in enumerate(sorted(names)):
            os.utime(top + '/' + n, ns=(T0, T0 + i * 1_000_003), follow_symlinks=False)
        os.utime(top, ns=(T0, T0 + len(names)))


def look(path):
    """What one name is: a comparable tuple without its content."""
    s = os.lstat(path)
    kind = stat.S_IFMT(s.st_mode)
    xs = {n: os.getxattr(path, n, follow_symlinks=False) for n in os.listxattr(path, follow_symlinks=False)}
    return {'kind': kind, 'mode': stat.S_IMODE(s.st_mode), 'uid': s.st_uid, 'gid': s.st_gid, 'xattrs': xs,
            'size': 0 if kind == stat.S_IFDIR else s.st_size, 'mtime': s.st_mtime_ns, 'ino': s.st_ino,
            'nlink': 0 if kind == stat.S_IFDIR else s.st_nlink,
            'target': os.readlink(path) if kind == stat.S_IFLNK else None}


def tree(root):
    """All relative names below root."""
    out = []
    for top, dirs, names in os.walk(root):
        rel = os.path.relpath(top, root)
        out += [os.path.normpath(os.path.join(rel, n)) for n in dirs + names]
    return sorted(out)


def strays(dst):
    """What is pending below a directory that is done: a restart would take it for the user's own, and zeros for its bytes.
    An `L` without anything pending below may be left anywhere (D6)."""
    found, done = [], set()
    if not os.path.lexists(dst + '/' + CONTROL):
        return found
    for top, dirs, names in os.walk(dst):
        if top == dst:
            dirs.remove(CONTROL)
        if top in done or mark(top) is None:
            done.update(top + '/' + n for n in dirs)
            found += [p for p in (top + '/' + n for n in dirs + names) if is_pending(p)]
    return found


def mark(path):
    """The value of the mark, or None."""
    for name in MARKS:
        try:
            return os.getxattr(path, name, follow_symlinks=False)
        except OSError as e:
            if e.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
    return None


def is_pending(path):
    """Anything that carries a mark, but for a directory whose names are all there."""
    value = mark(path)
    return value is not None and not (value[0] & 1 and stat.S_ISDIR(os.lstat(path).st_mode))


def traces(dst):
    """What is left in dst of the program; [] when nothing is."""
    left = [CONTROL] if os.path.lexists(dst + '/' + CONTROL) else []
    for n in ['.'] + tree(dst):
        left += [n + ': ' + x for x in os.listxattr(dst + '/' + n, follow_symlinks=False) if x in MARKS]
    return left


def read(path):
    with open(path, 'rb') as f:
        return f.read()


def scratch(prefix):
    import tempfile
    return os.path.realpath(tempfile.mkdtemp(prefix=prefix))


def remove(work):
    """Unmounts what is below a scratch directory and removes it."""
    while True:
        below = [l.split()[4] for l in open('/proc/self/mountinfo') if l.split()[4].startswith(work + '/')]
        if not below or libc.umount2(os.fsencode(below[-1]), 2):
            break
    shutil.rmtree(work, ignore_errors=True)
