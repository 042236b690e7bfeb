#!/usr/bin/env bash
# prefetch.sh [RUNS] - what prefetch and a replayed trace save on a cold tree whose source keeps every request waiting.
# As root. The source is the test kit's slowfs (US=1000 microseconds for each request; MIRRORFS_KIT, gcc, libfuse3-dev).
# Workloads: `git status` of a repository, `cargo build` of a crate with 120 modules, the start of PostgreSQL with its
# cluster in the tree; what is missing is left out. Around them are OTHER=20000 files for the walker. Prints seconds
# (median of RUNS, 3), how many files were waited for, how many came ahead and how many of those were opened.
# MIRRORFS=... is the program (a release build is found by itself).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec python3 - "$here" "${1:-3}" <<'PY'
import glob, json, os, shutil, statistics, subprocess, sys, time
here, runs = sys.argv[1], int(sys.argv[2])
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(here, '../crash'))
import lab

us = os.environ.get('US', '1000')
other = int(os.environ.get('OTHER', 20000))
source = lab.kit('slowfs.c') or lab.die('prefetch.sh: no slowfs.c (MIRRORFS_KIT)')
lab.own_namespace()
work = lab.scratch('mirrorfs-bench.')
os.chmod(work, 0o755)
slow, src, at = work + '/slow', work + '/src', work + '/mnt'
for d in slow, src, at:
    os.mkdir(d)


def sh(cmd, cwd='/', limit=300, quiet=True):
    out = subprocess.DEVNULL if quiet else None
    subprocess.run(cmd, shell=True, cwd=cwd, check=True, stdout=out, stderr=out, timeout=limit)


git = 'git -c user.name=a -c user.email=a@b -c safe.directory=* '
flags = subprocess.run(['pkg-config', '--cflags', '--libs', 'fuse3'], capture_output=True, text=True, check=True).stdout
sh('gcc -O2 -o %s/slowfs %s %s -lpthread' % (work, source, flags.strip()))
for n in range(other):
    d = '%s/other/d%03d' % (src, n // 100)
    os.makedirs(d, exist_ok=True)
    with open('%s/f%02d' % (d, n % 100), 'wb') as f:
        f.write(b'a small file\n' * (n % 600 + 1))
for n in range(800):
    d = '%s/repo/d%02d' % (src, n // 40)
    os.makedirs(d, exist_ok=True)
    with open('%s/f%02d' % (d, n % 40), 'wb') as f:
        f.write(b'%d in a small file\n' % n * (n % 300 + 1))
sh(git + 'init -q && ' + git + 'add -A && ' + git + 'commit -qm a', src + '/repo')
os.makedirs(src + '/crate/src')
with open(src + '/crate/Cargo.toml', 'w') as f:
    f.write('[package]\nname = "many"\nversion = "0.1.0"\nedition = "2021"\n')
for n in range(120):
    with open('%s/crate/src/m%03d.rs' % (src, n), 'w') as f:
        f.write('pub fn f(x: u64) -> u64 { x + %d }\n' % n)
with open(src + '/crate/src/main.rs', 'w') as f:
    f.writelines('mod m%03d;\n' % n for n in range(120))
    f.write('fn main() { println!("{}", [%s].iter().sum::<u64>()); }\n' % ', '.join('m%03d::f(1)' % n for n in range(120)))
WORKLOADS = {'git status': git + '-C repo status'}
if shutil.which('cargo'):
    WORKLOADS['cargo build, 121 source files'] = 'CARGO_TARGET_DIR=%s/out cargo build -q --offline --manifest-path crate/Cargo.toml; rm -rf %s/out' % (work, work)
pg = (sorted(glob.glob('/usr/lib/postgresql/*/bin')) or [None])[-1]
if pg:
    os.mkdir(src + '/pg')
    shutil.chown(src + '/pg', 'postgres', 'postgres')
    sh('setpriv --reuid=postgres --regid=postgres --clear-groups %s/initdb -D %s/pg/data' % (pg, src))
    WORKLOADS['PostgreSQL start, a query, stop'] = (
        'setpriv --reuid=postgres --regid=postgres --clear-groups sh -ec "'
        '%s/pg_ctl -w -D pg/data -l /dev/null -o \'-k /tmp -p 54329 -c listen_addresses=\' start; '
        'psql -h /tmp -p 54329 -c \'select count(*) from pg_class, pg_proc limit 1\' postgres; %s/pg_ctl -w -D pg/data -m fast stop"' % (pg, pg))
view = subprocess.Popen([work + '/slowfs', src, slow, 'us=' + us], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while not lab.mounted_at(slow):
    time.sleep(0.05)


def one(cmd, args):
    fs = lab.make_fs('ext4', work)
    dst = fs + '/dst'
    os.mkdir(dst)
    mount = lab.Mount(slow, dst, at, work + '/log', args)
    try:
        t = time.perf_counter()
        sh(cmd, at)
        t = time.perf_counter() - t
        status = json.loads(mount.status()[1])
        status = status[0] if isinstance(status, list) else status
        return t, [status[k] for k in ('demand_files', 'prefetched_files', 'prefetch_hits')]
    finally:
        mount.stop()
        subprocess.run(['umount', '-l', fs], check=True)
        os.rmdir(fs)
        os.remove(work + '/image')


print('| workload | mount | seconds (min-max) | waited for | came ahead | of these opened |\n| --- | --- | --- | --- | --- | --- |')
try:
    for name, cmd in WORKLOADS.items():
        trace = work + '/trace'
        one(cmd, ['--no-background', '--record', trace])
        ways = [('noprefetch', ['-o', 'noprefetch']), ('as it is', []), ('--replay', ['--replay', trace]),
                ('--no-background', ['--no-background']), ('--no-background --replay', ['--no-background', '--replay', trace])]
        got = {way: [] for way, _ in ways}
        for _ in range(runs):
            for way, args in ways:
                got[way].append(one(cmd, args))
        for way, _ in ways:
            times = sorted(t for t, _ in got[way])
            middle = sorted(got[way])[len(times) // 2][1]
            print('| %s | %s | %.2f (%.2f-%.2f) | %d | %d | %d |' % (name, way, statistics.median(times), times[0], times[-1], *middle), flush=True)
finally:
    view.terminate()
    subprocess.run(['umount', '-l', slow], stderr=subprocess.DEVNULL)
    view.wait()
    lab.remove(work)
PY
