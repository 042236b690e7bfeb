#!/usr/bin/env bash
# requests.sh - how many requests of each kind the kernel sends for what people do in a hydrated tree.
# As root. Each row is one command; cold: a new mount, the kernel knows nothing; warm: the same command again (what
# writes runs on a new place). FILES=1000 (in directories of 50), MIRRORFS=... is the program, EXTRA more arguments
# of mount. The counts are those of mirrorfs_requests_total.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec python3 - "$here" <<'PY'
import os, re, shutil, socket, subprocess, sys, time, urllib.request
here = sys.argv[1]
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(here, '../crash'))
import lab

files = int(os.environ.get('FILES', 1000))
extra = os.environ.get('EXTRA', '').split()
lab.own_namespace()
work = lab.scratch('mirrorfs-bench.')
fs = lab.make_fs('ext4', work)
src, dst, at = fs + '/src', fs + '/dst', work + '/mnt'
for d in src, dst, at:
    os.mkdir(d)
for n in range(files):
    d = '%s/tree/d%02d' % (src, n // 50)
    os.makedirs(d, exist_ok=True)
    with open('%s/f%02d' % (d, n % 50), 'wb') as f:
        f.write(b'a small file\n' * (n % 300 + 1))
    if n % 50 == 0:
        os.symlink('f01', d + '/link')
sh = lambda cmd, cwd='/': subprocess.run(cmd, shell=True, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
git = 'git -c user.name=a -c user.email=a@b -c safe.directory=* '
shutil.copytree(src + '/tree', src + '/repo', symlinks=True)
sh(git + 'init -q && ' + git + 'add -A && ' + git + 'commit -qm a', src + '/repo')
os.mkdir(src + '/c')
for n in range(30):
    with open('%s/c/m%02d.c' % (src, n), 'w') as f:
        f.write('#include "all.h"\nint f%d(int x) { return x + %d; }\n' % (n, n))
with open(src + '/c/all.h', 'w') as f:
    f.writelines('int f%d(int);\n' % n for n in range(30))
with open(src + '/c/main.c', 'w') as f:
    f.write('#include "all.h"\nint main(void) { return f0(0); }\n')

with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]


def counts():
    text = urllib.request.urlopen('http://127.0.0.1:%d/metrics' % port, timeout=10).read().decode()
    found = re.findall(r'^mirrorfs_requests_total\{.*op="(\w+)".*\} (\d+)', text, re.M)
    return {op: int(n) for op, n in found}


def mount():
    sh(' '.join([lab.binary(), 'mount', '--log-file', work + '/log', '--metrics', str(port), *extra, src, dst, at]))
    sh(lab.binary() + ' wait ' + at)


def unmount():
    sh('umount ' + at)
    for _ in range(500):
        if subprocess.run([lab.binary(), 'status', '-H'], capture_output=True, text=True).stdout.find(at) < 0:
            return
        time.sleep(0.01)


def counted(cmd):
    sh('sync')
    time.sleep(0.2)
    before = counts()
    sh(cmd, at)
    time.sleep(0.3)  # Releases come late.
    after = counts()
    return {op: n - before.get(op, 0) for op, n in after.items() if n > before.get(op, 0) and op not in ('forget', 'batch_forget')}


COMMANDS = [
    ('ls -lR', 'ls -lR tree'),
    ('find -size', 'find tree -size +1'),
    ('tar', 'tar cf /dev/null --one-file-system tree; tar cf - tree | cat'),
    ('git status', git + '-C repo status'),
    ('cp -r', 'cp -r tree new%d'),
    ('compile 31 C files', 'mkdir o%d; cd o%d; for f in ../c/*.c; do cc -c $f; done; cc -o prog *.o; ./prog'),
    ('rm -r', 'rm -r new%d'),
]
print('| command | cache | requests | of which |\n| --- | --- | --- | --- |')
try:
    mount()
    for name, cmd in COMMANDS:
        if name != 'rm -r':
            unmount()
            mount()
        for n, cache in enumerate(['cold', 'warm']):
            if name == 'rm -r' and cache == 'cold':
                unmount()
                mount()
            got = counted(cmd.replace('%d', str(n)))
            ops = sorted(got.items(), key=lambda x: -x[1])
            print('| `%s` | %s | %d | %s |' % (name, cache, sum(got.values()), ', '.join('%d %s' % (n, op) for op, n in ops)), flush=True)
finally:
    subprocess.run(['umount', '-l', at], stderr=subprocess.DEVNULL)
    time.sleep(0.5)
    subprocess.run(['umount', '-l', fs], stderr=subprocess.DEVNULL)
    lab.remove(work)
PY
