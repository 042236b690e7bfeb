"""PostgreSQL as one of mix-power.py's actors: a cluster in single-user mode, one transaction a step.

Each transaction inserts its own row and changes five others. After a cut the server recovers by itself; every
transaction that had returned must be there, whole.
"""
import glob
import os
import shutil
import subprocess

import lab

ROWS = 200


class Postgres:
    def __init__(self, steps):
        self.last, self.running = steps, None

    def program(self, name):
        found = shutil.which(name) or max(glob.glob('/usr/lib/postgresql/*/bin/' + name), default=None)
        return found or lab.die('no %s: install postgresql, or leave postgres out of MIX' % name)

    def as_user(self, *words, **more):
        # It refuses to run as root.
        return subprocess.Popen(['setpriv', '--reuid', 'postgres', '--regid', 'postgres', '--clear-groups', *words], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd='/', text=True, errors='replace', **more)

    def ask(self, top, *lines):
        if os.path.lexists(top + '/postmaster.pid'):
            os.unlink(top + '/postmaster.pid')      # Of a process that the cut has ended.
        p = self.as_user(self.program('postgres'), '--single', '-D', top, 'postgres')
        return p.communicate(''.join(line + '\n' for line in lines), 120)[0], p.returncode

    def prepare(self, top):
        os.makedirs(top, mode=0o700)
        shutil.chown(top, 'postgres', 'postgres')
        p = self.as_user(self.program('initdb'), '-D', top, '--wal-segsize=1', '--locale=C', '--no-sync')
        said = p.communicate()[0]
        if p.returncode:
            lab.die(said)
        said, rc = self.ask(top, 'CREATE TABLE t (id int PRIMARY KEY, k int);',
                            'INSERT INTO t SELECT i, 0 FROM generate_series(0, %d) i;' % (ROWS - 1))
        if rc or 'ERROR' in said:
            lab.die(said)

    def touched(self, rng):
        return sorted(rng.sample(range(ROWS), 5))

    def steps(self, top, rng):
        p = self.running = self.as_user(self.program('postgres'), '--single', '-D', top, 'postgres', bufsize=0)
        self.until_prompt(p)
        for k in range(1, 10**6):
            ids = ', '.join(map(str, self.touched(rng)))
            # One command is one transaction.
            p.stdin.write('WITH u AS (UPDATE t SET k = %d WHERE id IN (%s)) INSERT INTO t VALUES (%d, %d);\n' % (k, ids, ROWS + k, k))
            p.stdin.flush()
            said = self.until_prompt(p)
            if 'ERROR' in said or 'PANIC' in said:
                raise RuntimeError(said)
            if k == self.last:
                p.stdin.close()
                p.wait(60)
            yield

    def until_prompt(self, p):
        said = ''
        while not said.endswith('backend> '):
            c = p.stdout.read(1)
            if not c:
                raise RuntimeError('postgres ended: ' + said[-500:])
            said += c
        return said

    def kill(self):
        if self.running:
            self.running.kill()

    def check(self, top, rng, acked):
        said, rc = self.ask(top, "SELECT string_agg(id || ':' || k, ' ' ORDER BY id) AS all_rows FROM t;")
        if rc or 'all_rows = "' not in said:
            return ['postgres: ' + said.strip()[-400:]]
        rows = dict(map(int, r.split(':')) for r in said.split('all_rows = "')[1].split('"')[0].split())
        reached = max(rows.values())
        if reached < acked:
            return ['transaction %d is the last, %d was promised' % (reached, acked)]
        want = {i: 0 for i in range(ROWS)}
        for k in range(1, reached + 1):
            want.update({i: k for i in self.touched(rng)})
            want[ROWS + k] = k
        return [] if rows == want else ['after transaction %d: rows are wrong' % reached]
