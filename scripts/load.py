#!/usr/bin/env python3
"""load.py: many processes at work on a tree that is being pulled. As root.

  load.py [--fs ext4 xfs btrfs] [--transport dev uring] [--seconds 120] [--clients 24] [--files 150] [--rows 8] [--no-fio] [--no-stress]
  load.py --many 1000000 [--fs ext4]      so many empty files in one run: memory over files, as a table

For each file system and transport: `clients` processes, each with a random workload on its own subtree whose every answer is
checked against a model (kill9.py's, without the kills); fio with verify=crc32c by psync, mmap, io_uring and O_DIRECT;
stress-ng's file-system stressors, those that work on the file system without mirrorfs. Meanwhile the background pulls, held back so that
it lasts as long as the run, and the daemon is looked at each second: memory, fds, threads. Nothing may fail; memory and
fds may not grow from the middle of the run to its end; when nothing moves for 60 s a watchdog writes down every thread of the
daemon (kernel and user stacks), the kernel's view of the connection and `status --json`. In the end the migration is finished and dst compared
with what the clients have done. Exit 0: all of that holds.
"""
import argparse
import glob
import mmap
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE + '/crash')
import kill9
import lab

HANG = 60                   # seconds without any progress
# So many it may keep open: 1,024 inodes and 1,024 directories of dst (anchor.rs, node.rs), 512 directories of src (source.rs).
FDS_KEPT = 2560
# Not: what needs a device or a file system of its own, or is about something else than files.
STRESSORS = '''access chdir chmod chown copy-file dentry dir dirdeep dirmany dup fallocate fcntl fiemap filename flock
 fpunch fsize fstat getdent hdd inotify io lease link locka lockf lockofd metamix mknod mmap null open readahead rename
 seek sendfile splice symlink sync-file touch unlink utime xattr'''.split()


class Client(kill9.Lab):
    """One process with a subtree of its own: kill9's operations, nobody is killed."""

    def __init__(self, at, model, counter):
        self.at, self.models, self.counter = at, [model], counter
        self.bad, self.killed, self.done = [], threading.Event(), 0
        self.n = dict.fromkeys(('ops', 'reads', 'writes', 'fsyncs', 'deletes', 'renames', 'in_flight', 'write_checks',
                                'delete_checks', 'entries_compared'), 0)

    def excused(self, e):
        """Nobody is killed: an error is an error also at the end."""
        return False

    @property
    def beat(self):
        return 0

    @beat.setter
    def beat(self, _):
        self.done += 1
        beats, slot, names = self.counter
        struct.pack_into('<Q', beats, slot * 8, self.done)
        struct.pack_into('<Q', beats, names * 8, len(self.models[0].names))


class Watch:
    """Looks at the daemon each second; tells when nothing moves. The clients' names are from slot `names` on."""

    def __init__(self, mount, beats, names, work):
        self.mount, self.beats, self.names, self.work = mount, beats, names, work
        self.samples, self.hung, self.over = [], None, threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        last, since, t0 = None, time.monotonic(), time.monotonic()
        while not self.over.wait(1):
            now = bytes(self.beats)
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > HANG and not self.hung:
                self.hung = self.dump()
                self.mount.kill()       # Whoever waits hears of it, and the run ends.
            try:
                names = sum(n for (n,) in struct.iter_unpack('<Q', now[self.names * 8:]))
                self.samples.append((time.monotonic() - t0, *look_at(self.mount.proc.pid), names))
            except OSError:
                return

    def dump(self):
        """What everybody waits for, into a file."""
        pid, path = self.mount.proc.pid, self.work + '/hang'
        with open(path, 'w') as out:
            for task in sorted(glob.glob('/proc/%d/task/*' % pid)):
                for name in ('comm', 'wchan', 'stack'):
                    try:
                        out.write('%s: %s\n' % (name, open(task + '/' + name).read().strip()))
                    except OSError as e:
                        out.write('%s: %s\n' % (name, e))
            for waiting in glob.glob('/sys/fs/fuse/connections/*/waiting'):
                out.write('%s: %s' % (waiting, open(waiting).read()))
            for tool in (['gdb', '-p', str(pid), '-batch', '-ex', 'thread apply all bt'],
                         [lab.binary(), 'status', '--json', self.mount.at]):
                try:
                    p = subprocess.run(tool, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
                    out.write(p.stdout.decode(errors='replace'))
                except (OSError, subprocess.TimeoutExpired) as e:
                    out.write('%s: %s\n' % (tool[0], e))
            out.write(self.mount.tail())
        return path

    def stop(self):
        self.over.set()
        self.thread.join()
        return self.samples


def look_at(pid):
    """Anonymous and whole memory in KiB, fds, threads."""
    lines = dict(l.split(':', 1) for l in open('/proc/%d/status' % pid))
    return (int(lines['RssAnon'].split()[0]), int(lines['VmRSS'].split()[0]), len(os.listdir('/proc/%d/fd' % pid)),
            int(lines['Threads']))


def median(values):
    return sorted(values)[len(values) // 2] if values else 0


def grew(samples):
    """Why the daemon has grown from the middle of the run to its end; '' when it has not."""
    n = len(samples)
    middle, end = samples[n * 2 // 5:n * 3 // 5], samples[n * 17 // 20:]
    for what, i, slack, kept in (('KiB of anonymous memory', 1, 24 << 10, 0), ('fds', 3, 200, FDS_KEPT)):
        a, b = median([s[i] for s in middle]), median([s[i] for s in end])
        if b > max(a, kept) * 1.35 + slack:
            return '%d %s in the middle of the run, %d at its end' % (a, what, b)
    return ''


def stress(at, name, seconds):
    """One stressor; what it said when it failed."""
    d = '%s/stress-%s' % (at, name)
    os.makedirs(d, exist_ok=True)
    p = subprocess.Popen(['stress-ng', '--' + name, '2', '--timeout', '%ds' % seconds, '--temp-path', d, '--verify', '--log-brief',
                          '--hdd-bytes', '16m', '--fallocate-bytes', '16m', '--dirmany-bytes', '1m'],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace', start_new_session=True)
    try:
        said, _ = p.communicate(timeout=seconds + 120)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        return 'does not end'
    shutil.rmtree(d, ignore_errors=True)
    # 3: not enough resources; 4: not here.
    return '' if p.returncode in (0, 3, 4) else 'exit %d: %s' % (p.returncode, said.strip()[-300:])


FIO = '''[global]
directory=%s
size=12m
bsrange=4k-64k
rw=randwrite
verify=crc32c
verify_fatal=1
do_verify=1
fallocate=none
end_fsync=1
filename_format=fv-$jobname-$jobnum
[psync]
ioengine=psync
[mmap]
ioengine=mmap
[uring]
ioengine=io_uring
iodepth=16
[direct]
ioengine=libaio
direct=1
iodepth=8
'''


class Run:
    def __init__(self, o, fs, transport):
        self.o, self.rng = o, random.Random(o.seed)
        self.bad, self.rounds = [], {'fio': 0, 'stress': 0}
        self.work = lab.scratch('mirrorfs-load.')
        os.environ['MIRRORFS_RUN_DIR'] = os.environ['MIRRORFS_STATE_DIR'] = self.work + '/run'
        self.fs = lab.make_fs(fs, self.work, 6 << 30)
        self.src, self.dst, self.at = self.fs + '/src', self.fs + '/dst', self.work + '/mnt'
        for d in (self.src, self.dst, self.at):
            os.mkdir(d)
        lab.fill_src(self.src, 'load-%d' % o.seed, o.clients, o.files, big=1)
        for i in range(o.clients):
            shutil.move('%s/t%d/big0' % (self.src, i), '%s/big%d' % (self.src, i))
        os.mkdir(self.src + '/tools')
        self.transport = transport
        # A count of what was done for each client, fio and stress-ng; then, of each client, how many names it has.
        self.beats = mmap.mmap(-1, 8 * (2 * o.clients + 2))

    def beat(self, slot):
        struct.pack_into('<Q', self.beats, slot * 8, struct.unpack_from('<Q', self.beats, slot * 8)[0] + 1)

    def run(self):
        o = self.o
        usable = [] if o.no_stress else self.usable()
        total = sum(os.lstat(self.src + '/' + n).st_size for n in lab.tree(self.src))
        args = ['--transport', self.transport, '--bwlimit', '%dK' % max(64, total // max(1, o.seconds) // 1024)]
        self.mount = lab.Mount(self.src, self.dst, self.at, self.work + '/log', args)
        watch = Watch(self.mount, self.beats, o.clients + 2, self.work)
        end = time.monotonic() + o.seconds
        children = [self.client(i, end) for i in range(o.clients)]
        threads = [threading.Thread(target=self.fio, args=(end,))] if not o.no_fio else []
        threads += [threading.Thread(target=self.stress, args=(end, usable))] if usable else []
        threads += [threading.Thread(target=self.read_big, args=(end,))]
        [t.start() for t in threads]
        done = 0
        for pid, result in children:
            with os.fdopen(result) as f:
                lines = f.read().splitlines()
            os.waitpid(pid, 0)
            self.bad += [l[4:] for l in lines if l.startswith('BAD ')]
            counts = [l for l in lines if l.startswith('OPS ')]
            if not counts:
                self.bad.append('a client died')
            done += sum(int(l[4:]) for l in counts)
        [t.join() for t in threads]
        samples = watch.stop()
        if watch.hung:
            self.bad.append('nothing moved for %d s:\n%s' % (HANG, open(watch.hung).read()))
            return samples, done
        why = grew(samples)
        if why:
            self.bad.append(why)
        shutil.rmtree(self.at + '/tools', ignore_errors=True)
        lab.ask('set', '--bwlimit', '0', self.at)
        try:
            self.mount.finish()
            self.bad += ['trace: ' + t for t in lab.traces(self.dst)]
            self.compare()
        except RuntimeError as e:
            self.bad.append(str(e))
        return samples, done

    def usable(self):
        """The stressors that work on the file system itself."""
        d = self.fs + '/native'
        os.mkdir(d)
        said = {}
        some = self.rng.sample(STRESSORS, min(self.o.stressors, len(STRESSORS)))
        for name in some:
            said[name] = stress(d, name, 1)
        shutil.rmtree(d, ignore_errors=True)
        left_out = sorted(n for n in said if said[n])
        if left_out:
            print('  not used, they fail without mirrorfs: ' + ' '.join(left_out), flush=True)
        return [n for n in some if not said[n]]

    def client(self, i, end):
        """A process; its result comes through a pipe."""
        r, w = os.pipe()
        pid = os.fork()
        if pid:
            os.close(w)
            return pid, r
        os.close(r)
        code = 1
        try:
            model = kill9.Model('t%d' % i, self.src, random.Random('%d-%d' % (self.o.seed, i)))
            client = Client(self.at, model, (self.beats, i, self.o.clients + 2 + i))
            timer = threading.Timer(max(0, end - time.monotonic()), client.killed.set)
            timer.daemon = True
            timer.start()
            while not client.killed.is_set() and not client.bad:
                client.worker(model)
            client.check_known()
            # What is left for the comparison after finish.
            import pickle
            with open('%s/model%d' % (self.work, i), 'wb') as f:
                pickle.dump(({p: (n.kind, n.data, n.mode, n.target, n.mtime, n.xattrs) for p, n in model.names.items()},
                             [sorted(p for p, m in model.names.items() if m is n) for n in set(model.names.values())]), f)
            with os.fdopen(w, 'w') as out:
                out.writelines('BAD client %d: %s\n' % (i, b.replace('\n', ' ')) for b in client.bad)
                out.write('OPS %d\n' % client.n['ops'])
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(code)

    def compare(self):
        import pickle
        for i in range(self.o.clients):
            with open('%s/model%d' % (self.work, i), 'rb') as f:
                want, _ = pickle.load(f)
            got = {'t%d' % i} | {'t%d/%s' % (i, n) for n in lab.tree('%s/t%d' % (self.dst, i))}
            self.bad += ['after finish: %s is missing' % p for p in sorted(set(want) - got)]
            self.bad += ['after finish: %s should not be there' % p for p in sorted(got - set(want))]
            for p in sorted(set(want) & got):
                kind, data, mode, target, mtime, xattrs = want[p]
                l = lab.look(self.dst + '/' + p)
                same = (kind, mode, target, xattrs) == (l['kind'], l['mode'], l['target'], l['xattrs']) and mtime in (None, l['mtime'])
                if not same or kind == stat.S_IFREG and lab.read(self.dst + '/' + p) != data:
                    self.bad.append('after finish: %s is not what client %d has left' % (p, i))

    def fio(self, end):
        d = self.at + '/tools/fio'
        while time.monotonic() < end:
            os.makedirs(d, exist_ok=True)
            job = self.work + '/fio-job'
            with open(job, 'w') as f:
                f.write(FIO % d + 'randseed=%d\n' % self.rng.randrange(10**6))
            p = subprocess.run(['fio', '--output-format=terse', job], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.work)
            if p.returncode or 'verify: bad' in p.stdout:
                self.bad.append('fio: exit %d: %s' % (p.returncode, p.stdout[-500:]))
                return
            shutil.rmtree(d)
            self.rounds['fio'] += 1
            self.beat(self.o.clients)

    def stress(self, end, names):
        while time.monotonic() < end:
            for name in self.rng.sample(names, len(names)):
                if time.monotonic() >= end:
                    return
                said = stress(self.at + '/tools', name, 3)
                if said:
                    self.bad.append('stress-ng %s: %s' % (name, said))
                self.rounds['stress'] += 1
                self.beat(self.o.clients + 1)

    def read_big(self, end):
        """Ranges of large files that are pending."""
        want = [lab.read('%s/big%d' % (self.src, i)) for i in range(min(4, self.o.clients))]
        rng = random.Random(1)
        while time.monotonic() < end:
            i, at = rng.randrange(len(want)), rng.randrange(12 << 20)
            with open('%s/big%d' % (self.at, i), 'rb', buffering=0) as f:
                if os.pread(f.fileno(), 70_000, at) != want[i][at:at + 70_000]:
                    self.bad.append('big%d: wrong bytes at %d' % (i, at))
                    return
            time.sleep(0.02)

    def clean(self):
        self.mount.stop()
        lab.remove(self.work)


def table(samples, rows):
    n = len(samples)
    picked = [samples[i * (n - 1) // (rows - 1)] for i in range(rows)] if n > rows else samples
    print('  seconds  anon KiB   rss KiB   fds  threads   names')
    for s in picked:
        print('  %7.0f  %8d  %8d  %4d  %7d  %6d' % s)


def many(o):
    """Memory over the number of files: empty ones, 1,000 in a directory."""
    work = lab.scratch('mirrorfs-many.')
    os.environ['MIRRORFS_RUN_DIR'] = os.environ['MIRRORFS_STATE_DIR'] = work + '/run'
    # ext4 makes one inode for each 16 KiB: both trees need theirs.
    fs = lab.make_fs(o.fs[0], work, max(4 << 30, 5 * o.many * (16 << 10) // 2))
    src, dst, at = fs + '/src', fs + '/dst', work + '/mnt'
    for d in (src, dst, at):
        os.mkdir(d)
    t = time.monotonic()
    for d in range((o.many + 999) // 1000):
        top = '%s/d%d/d%d' % (src, d // 100, d)
        os.makedirs(top)
        fd = os.open(top, os.O_RDONLY)
        for i in range(min(1000, o.many - d * 1000)):
            os.mknod('file%d' % i, 0o644 | stat.S_IFREG, dir_fd=fd)
        os.close(fd)
    print('%d files made in %.0f s' % (o.many, time.monotonic() - t), flush=True)
    bad = []
    t = time.monotonic()
    mount = lab.Mount(src, dst, at, work + '/log')
    try:
        import json
        print('  seconds      files  anon KiB   rss KiB   fds', flush=True)
        most = first = 0
        while True:
            time.sleep(o.many / 200_000)
            rc, out = mount.status()
            state = json.loads(out) if rc == 0 else {}
            state = state[0] if isinstance(state, list) else state
            anon, rss, fds, _ = look_at(mount.proc.pid)
            most, first = max(most, anon), first or anon
            print('  %7.0f  %9d  %8d  %8d  %4d' % (time.monotonic() - t, state.get('files_pulled', 0), anon, rss, fds), flush=True)
            if state.get('state') == 'COMPLETE':
                break
        limit = (100 << 10) + o.many // 1000
        if most > limit:
            bad.append('%d KiB of memory, %d are the limit for so many files' % (most, limit))
        # Now the kernel asks for all of them.
        names = sum(len(names) for _, _, names in os.walk(at))
        print('listed: %d files, anon %d KiB' % (names, look_at(mount.proc.pid)[0]))
        if names != o.many:
            bad.append('%d files are there' % names)
        mount.finish(300)
        print('finished after %.0f s' % (time.monotonic() - t))
    except RuntimeError as e:
        bad.append(str(e))
    finally:
        mount.stop()
        lab.remove(work)
    print('\n'.join(bad))
    return 1 if bad else 0


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--fs', nargs='+', default=['ext4', 'xfs', 'btrfs'])
    ap.add_argument('--transport', nargs='+', default=['dev', 'uring'])
    ap.add_argument('--seconds', type=int, default=120)
    ap.add_argument('--clients', type=int, default=24)
    ap.add_argument('--files', type=int, default=150, help='of each client')
    ap.add_argument('--stressors', type=int, default=12, help='how many of stress-ng\'s, chosen by the seed')
    ap.add_argument('--seed', type=int, default=1)
    ap.add_argument('--rows', type=int, default=8, help='of the table of memory and of the names that the clients have')
    ap.add_argument('--no-fio', action='store_true')
    ap.add_argument('--no-stress', action='store_true')
    ap.add_argument('--many', type=int)
    o = ap.parse_args()
    for tool, off in (('fio', 'no_fio'), ('stress-ng', 'no_stress')):
        if not shutil.which(tool) and not getattr(o, off):
            print('no %s: left out' % tool)
            setattr(o, off, True)
    os.umask(0)
    lab.own_namespace()
    if o.many:
        return many(o)
    rc = 0
    for fs in o.fs:
        for transport in o.transport:
            t, run = time.monotonic(), Run(o, fs, transport)
            try:
                samples, ops = run.run()
            finally:
                run.clean()
            table(samples, o.rows)
            print('%s, %s: %d clients, %d operations, %d rounds of fio, %d stressors, %.0f s, seed %d: %d bad' % (
                fs, transport, o.clients, ops, run.rounds['fio'], run.rounds['stress'], time.monotonic() - t, o.seed, len(run.bad)), flush=True)
            for b in run.bad[:20]:
                print('BAD ' + b)
            rc |= bool(run.bad)
    return rc


if __name__ == '__main__':
    sys.exit(main())
