#!/usr/bin/env python3
"""mix-power.py: power cuts under what real programs do (powercut.sh starts it, with WHAT=mix). As root.

  mix-power.py prepare LAB     makes LAB/src: a mail spool, two SQLite databases, a git repository, logs, other files
  mix-power.py write LAB       $DST is the disk that will lose its power, $ACK takes what is promised
  mix-power.py check LAB       $DST is the disk afterwards, $ACKED what had been promised before the cut

While a migration runs, all of these work at once, on what they find pending: mail is delivered, read and deleted (write to
tmp, fsync, rename, fsync of the directories); SQLite commits, with a rollback journal and with a WAL; git commits; logs grow
by O_APPEND and fdatasync or O_DSYNC, and are rotated. MIX="mail sql wal git log postgres" chooses (postgres only when it is
named: its cluster is some 40 MB). Each step is acknowledged when the program that did it would call it durable. The checker
asks the programs: integrity_check, git fsck, the rows of the transaction that was reached; nothing acknowledged may be
missing, before the migration is resumed to its end and after. PLAIN=1 does all of it on a copy, without mirrorfs: what
the file system itself does to such programs.
"""
import glob
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import lab
import mix_postgres

STEPS = 24                  # of each actor in one migration
MAILS, ROWS, COMMITS, LINES, OTHERS = 40, 300, 6, 400, 120
NOW = dict(os.environ, GIT_CONFIG_NOSYSTEM='1', GIT_CONFIG_GLOBAL='/dev/null', GIT_AUTHOR_NAME='a', GIT_AUTHOR_EMAIL='a@b',
           GIT_COMMITTER_NAME='a', GIT_COMMITTER_EMAIL='a@b', GIT_AUTHOR_DATE='1400000000 +0000',
           GIT_COMMITTER_DATE='1400000000 +0000')


def chosen():
    return os.environ.get('MIX', 'mail sql wal git log').split()


def sync_dir(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_synced(path, data, flags=os.O_CREAT | os.O_EXCL):
    fd = os.open(path, os.O_WRONLY | flags, 0o640)
    try:
        if os.write(fd, data) != len(data):
            raise OSError('short write')
        os.fsync(fd)
    finally:
        os.close(fd)


# Every actor: prepare(top) makes what src has; steps(top, rng) does one step after the other; check(top, acked) says what is
# wrong when `acked` steps had been promised (any later one may have happened). What a step does depends on its number and
# the random generator alone, so the checker can tell what there must be.

class Mail:
    """A maildir: each message is whole and where it was put last; or deleted, for good."""

    def letter(self, i):
        return lab.data('mail %s' % i, 500 + i * 7919 % 30_000)

    def prepare(self, top):
        for d in ('tmp', 'new', 'cur'):
            os.makedirs(top + '/' + d)
        for i in range(MAILS):
            with open('%s/%s/m%d' % (top, 'new' if i % 2 else 'cur', i), 'wb') as f:
                f.write(self.letter(i))

    def plan(self, rng):
        """Endless: (what, message) and where every message then is."""
        where = {i: 'new' if i % 2 else 'cur' for i in range(MAILS)}
        for k in range(MAILS, 10**6):
            new = sorted(i for i, d in where.items() if d == 'new')
            cur = sorted(i for i, d in where.items() if d == 'cur')
            what = rng.choice(['deliver', 'deliver', 'read', 'read', 'delete'])
            if what == 'read' and new:
                i = rng.choice(new)
                where[i] = 'cur'
            elif what == 'delete' and cur:
                i = rng.choice(cur)
                where[i] = None
            else:
                what, i = 'deliver', k
                where[i] = 'new'
            yield what, i, dict(where)

    def steps(self, top, rng):
        for what, i, _ in self.plan(rng):
            tmp, new, cur = ('%s/%s/m%d' % (top, d, i) for d in ('tmp', 'new', 'cur'))
            if what == 'deliver':
                write_synced(tmp, self.letter(i))
                os.rename(tmp, new)
                sync_dir(top + '/new')
            elif what == 'read':
                os.rename(new, cur)
                sync_dir(top + '/cur')
                sync_dir(top + '/new')
            else:
                os.unlink(cur)
                sync_dir(top + '/cur')
            yield

    def check(self, top, rng, acked):
        states = [{i: 'new' if i % 2 else 'cur' for i in range(MAILS)}]
        for _, _, where in self.plan(rng):
            states.append(where)
            if len(states) > STEPS:
                break
        bad = []
        for i in sorted(states[-1]):
            found = [d for d in ('new', 'cur') if os.path.lexists('%s/%s/m%d' % (top, d, i))]
            may = {s.get(i) for s in states[acked:]}
            # Moved, and only the new directory was synced yet: btrfs itself brings back both names then.
            if not (set(found) or {None}) <= may:
                bad.append('message %d is in %s, should be in %s' % (i, found, may))
            elif found and lab.read('%s/%s/m%d' % (top, found[0], i)) != self.letter(i):
                bad.append('message %d in %s has other bytes' % (i, found[0]))
        return bad


class Sql:
    """A database: exactly the rows of some transaction, not before the one that was promised."""

    def __init__(self, journal):
        self.journal = journal

    def value(self, k, i):
        return lab.data('row %d %d' % (k, i), 600 + i % 3 * 900)

    def connect(self, top):
        db = sqlite3.connect(top + '/app.sqlite', isolation_level=None, timeout=30)
        db.execute('PRAGMA journal_mode=' + self.journal)
        db.execute('PRAGMA synchronous=EXTRA')
        db.execute('PRAGMA wal_autocheckpoint=20')
        return db

    def prepare(self, top):
        os.makedirs(top)
        db = self.connect(top)
        db.execute('BEGIN')
        db.execute('CREATE TABLE t (id INTEGER PRIMARY KEY, k INTEGER, v BLOB)')
        db.executemany('INSERT INTO t VALUES (?, 0, ?)', [(i, self.value(0, i)) for i in range(ROWS)])
        db.execute('COMMIT')
        db.close()

    def touched(self, k, rng):
        return sorted(rng.sample(range(ROWS), 8)) + [ROWS + k]

    def steps(self, top, rng):
        db = self.connect(top)
        for k in range(1, 10**6):
            db.execute('BEGIN IMMEDIATE')
            for i in self.touched(k, rng):
                db.execute('INSERT OR REPLACE INTO t VALUES (?, ?, ?)', (i, k, self.value(k, i)))
            db.execute('COMMIT')
            if k == STEPS:
                db.close()
            yield

    def check(self, top, rng, acked):
        try:
            db = sqlite3.connect(top + '/app.sqlite', isolation_level=None, timeout=30)
            ok = db.execute('PRAGMA integrity_check').fetchall()
            rows = {i: (k, v) for i, k, v in db.execute('SELECT id, k, v FROM t')}
            db.close()
        except sqlite3.Error as e:
            return ['%s' % e]
        if ok != [('ok',)]:
            return ['integrity_check: %s' % ok[:3]]
        reached = max([k for k, _ in rows.values()], default=0)
        if reached < acked:
            return ['transaction %d is the last, %d was promised' % (reached, acked)]
        want = {i: 0 for i in range(ROWS)}
        for k in range(1, reached + 1):
            want.update({i: k for i in self.touched(k, rng)})
        wrong = [i for i in set(want) | set(rows) if i not in rows or rows[i] != (want.get(i), self.value(want.get(i, 0), i))]
        return ['after transaction %d: %d rows are wrong' % (reached, len(wrong))] if wrong else []


class Git:
    """A repository: HEAD is a promised commit or a later one, and everything below it is whole."""

    def git(self, top, *words, data=None):
        sync = ['-c', 'core.fsync=all', '-c', 'core.fsyncMethod=fsync', '-c', 'gc.auto=0', '-c', 'safe.directory=*']
        p = subprocess.run(['git', *sync, '-C', top, *words], input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=NOW)
        if p.returncode:
            raise RuntimeError('git %s: %s' % (words[0], p.stderr.decode(errors='replace').strip()[-300:]))
        return p.stdout.decode().strip()

    def keep(self, top, *objects):
        """git syncs its files and not their names."""
        dirs = {'%s/.git/objects/%s' % (top, o[:2]) for o in objects}
        for d in sorted(dirs) + [top + '/.git/objects']:
            if os.path.isdir(d):
                sync_dir(d)

    def commit(self, top, k):
        blob = self.git(top, 'hash-object', '-w', '--stdin', data=lab.data('git %d' % k, 3000))
        self.keep(top, blob)
        self.git(top, 'update-index', '--add', '--cacheinfo', '100644,%s,f%d' % (blob, k % 9))
        tree = self.git(top, 'write-tree')
        self.keep(top, tree)
        parent = ['-p', 'HEAD'] if k else []
        commit = self.git(top, 'commit-tree', *parent, '-m', 'number %d' % k, tree)
        self.keep(top, commit)
        self.git(top, 'update-ref', 'HEAD', commit)
        sync_dir(top + '/.git/refs/heads')

    def prepare(self, top):
        os.makedirs(top)
        self.git(top, 'init', '-q', '-b', 'main')
        shutil.rmtree(top + '/.git/hooks', ignore_errors=True)
        for k in range(COMMITS):
            self.commit(top, k)

    def steps(self, top, rng):
        for k in range(COMMITS, 10**6):
            self.commit(top, k)
            yield

    def check(self, top, rng, acked):
        try:
            said = self.git(top, 'log', '-1', '--format=%s')
            self.git(top, 'fsck', '--strict', '--no-dangling', 'HEAD')
            k = int(said.split()[-1])
            if k < COMMITS - 1 + acked:
                return ['commit %d is the last, %d was promised' % (k, COMMITS - 1 + acked)]
            if self.git(top, 'rev-list', '--count', 'HEAD') != str(k + 1):
                return ['commits are missing below %d' % k]
        except RuntimeError as e:
            return [str(e)]
        return []


class Log:
    """Lines at the end of a log, which is renamed now and then: none that was promised is missing."""

    def line(self, k):
        return b'%06d %s\n' % (k, lab.data('line %d' % k, 50 + k % 7 * 30).hex().encode())

    def prepare(self, top):
        os.makedirs(top)
        with open(top + '/app.log', 'wb') as f:
            f.writelines(self.line(k) for k in range(LINES))

    def steps(self, top, rng):
        for k in range(10**6):
            if k % 9 == 8:
                os.rename(top + '/app.log', '%s/app.log.%06d' % (top, k))
                write_synced(top + '/app.log', b'')
                sync_dir(top)
            fd = os.open(top + '/app.log', os.O_WRONLY | os.O_APPEND | (os.O_DSYNC if k % 2 else 0))
            os.write(fd, self.line(LINES + k))
            if k % 2 == 0:
                os.fdatasync(fd)
            os.close(fd)
            yield

    def check(self, top, rng, acked):
        parts = sorted(glob.glob(top + '/app.log.*')) + [top + '/app.log'] * os.path.exists(top + '/app.log')
        got = b''.join(lab.read(p) for p in parts)
        want = b''.join(self.line(k) for k in range(LINES + acked))
        if got[:len(want)] != want:
            same = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
            zeros = ' (zeros)' if got[same:same + 100] and not any(got[same:same + 100]) else ''
            return ['%d bytes of %d that were promised are there%s' % (same, len(want), zeros)]
        return []


ACTORS = {'mail': Mail(), 'sql': Sql('DELETE'), 'wal': Sql('WAL'), 'git': Git(), 'log': Log(), 'postgres': mix_postgres.Postgres(STEPS)}


def rng_of(mig, name):
    return random.Random('%s-%d-%s' % (os.environ.get('SEED', '1'), mig, name))


def prepare(where):
    src = where + '/src'
    os.makedirs(src)
    for name in chosen():
        ACTORS[name].prepare('%s/%s' % (src, name))
    for i in range(OTHERS):
        d = '%s/others/d%d' % (src, i % 7)
        os.makedirs(d, exist_ok=True)
        with open('%s/f%d' % (d, i), 'wb') as f:
            f.write(lab.data('other %d' % i, [10, 3000, 90_000, 300_000][i % 4]))
    for top, _, names in os.walk(src + '/others', topdown=False):
        for n in names + ['.']:
            os.utime(top + '/' + n, ns=(lab.T0, lab.T0))


def write(where):
    os.umask(0o022)
    src, dst, at = where + '/src', os.environ['DST'], where + '/mnt'
    os.makedirs(at, exist_ok=True)

    def kill_actors():
        for name in chosen():
            getattr(ACTORS[name], 'kill', lambda: None)()
    w = lab.Writer(kill_actors)

    def act(root, mig, name, failed):
        rng = rng_of(mig, name)
        pace = random.Random(mig)
        try:
            for k, _ in enumerate(ACTORS[name].steps('%s/%s' % (root, name), rng), 1):
                w.promise('done', mig, name, k)
                if k == STEPS:
                    return
                time.sleep(pace.choice([0, 0.002, 0.02]))
        except Exception as e:
            failed.append('%s: %s: %s' % (name, type(e).__name__, e))

    for mig in range(10_000):
        root = '%s/dst%d' % (dst, mig)
        os.mkdir(root)
        sync_dir(dst)
        if os.environ.get('PLAIN'):
            subprocess.run(['cp', '-a', src + '/.', root], check=True)
            os.sync()
            at = root
        else:
            # Every other without the walker: then the last part is what the walker of a second mount does.
            lazy = mig % 2 == 0
            m = w.mount = lab.Mount(src, root, at, where + '/log', ['--no-background'] if lazy else [])
        failed = []
        threads = [threading.Thread(target=act, args=(at, mig, name, failed), daemon=True) for name in chosen()]
        [t.start() for t in threads]
        [t.join() for t in threads]
        if failed:
            # The checker never sees that; the line does.
            w.promise('failed', mig, '; '.join(failed).replace('\n', ' '))
            lab.die('; '.join(failed))
        if not os.environ.get('PLAIN'):
            if lazy:
                m.stop()
                m = w.mount = lab.Mount(src, root, at, where + '/log')
            m.finish()
            w.mount = None
        w.promise('finished', mig)


def check(where):
    src, dst, at = where + '/src', os.environ['DST'], where + '/check'
    os.makedirs(at, exist_ok=True)
    lines = list(lab.promised())
    acked = lab.latest(((int(w[1]), w[2]), w[3]) for w in lines if w[0] == 'done')
    finished = {int(w[1]) for w in lines if w[0] == 'finished'}
    bad = ['the writer: ' + ' '.join(w) for w in lines if w[0] == 'failed']
    there = lab.migrations(dst)
    bad += ['dst%d is gone' % mig for mig in sorted(finished | {m for m, _ in acked}) if mig not in there]
    # The one that was cut, and now and then the one before it.
    for mig in there[-random.choice([1, 1, 1, 2]):]:
        steps = {name: acked.get((mig, name), 0) for name in chosen()}
        bad += ['dst%d: %s' % (mig, b) for b in check_one(src, '%s/dst%d' % (dst, mig), at, where, mig, steps, mig in finished)]
    print('\n'.join(bad[:15]))
    return 1 if bad else 0


def check_one(src, root, at, where, mig, steps, finished):
    def ask(top, when):
        return ['%s: %s: %s (%d promised)' % (when, name, b, k) for name, k in steps.items()
                for b in ACTORS[name].check('%s/%s' % (top, name), rng_of(mig, name), k)]
    if os.environ.get('PLAIN'):
        # What was not synced when the copy was made is nobody's promise.
        return ask(root, 'after the cut') if any(steps.values()) else []
    bad = []
    # After the control directory is gone the migration is over, acknowledged or not.
    if not finished and not (all(k == STEPS for k in steps.values()) and not os.path.lexists(root + '/' + lab.CONTROL)):
        m = lab.Mount(src, root, at, where + '/check-log')
        try:
            bad += ask(at, 'after the cut')
            m.finish()
        except RuntimeError as e:
            return bad + [str(e)]
        finally:
            m.stop()
    bad += ['trace: ' + t for t in lab.traces(root)]
    names = lab.tree(src + '/others')
    if lab.tree(root + '/others') != names:
        bad.append('others: not the names of src')
    for n in names:
        a, b = lab.look('%s/others/%s' % (src, n)), lab.look('%s/others/%s' % (root, n))
        same = [a[k] == b[k] for k in ('kind', 'mode', 'uid', 'gid', 'size', 'mtime', 'xattrs')]
        if not all(same) or a['kind'] == stat.S_IFREG and lab.read('%s/others/%s' % (src, n)) != lab.read('%s/others/%s' % (root, n)):
            bad.append('others/%s is not as in src' % n)
    return bad + ask(root, 'after finish')


if __name__ == '__main__':
    lab.main(__doc__, prepare, write, check)
