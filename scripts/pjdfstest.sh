#!/usr/bin/env bash
# pjdfstest.sh [PATTERN...] - the POSIX file system tests, on a plain ext4 and on a mount over that ext4. As root.
# Prints the tests that only the mount fails. Exit 0: exactly those of scripts/pjdfstest.expected.
# Needs pjdfstest (cargo install pjdfstest --version 0.2.2), or PJDFSTEST=/path/to/it; MIRRORFS=/path/to/mirrorfs.
# FS=xfs or btrfs takes another file system, PENDING=1 leaves a pending tree beside the tests' own files.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec python3 - "$here" "$@" <<'PY'
import os, re, shutil, subprocess, sys, time
here, patterns = sys.argv[1], sys.argv[2:]
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(here, 'crash'))
import lab

tool = os.environ.get('PJDFSTEST') or shutil.which('pjdfstest') or os.path.expanduser('~/.cargo/bin/pjdfstest')
if not os.path.exists(tool):
    lab.die('no pjdfstest: cargo install pjdfstest --version 0.2.2')
kind = os.environ.get('FS', 'ext4')
lab.own_namespace()
# A short path: a socket's has 108 bytes.
work = lab.scratch('pj.')
os.chmod(work, 0o755)


def config(second):
    group = subprocess.run(['id', '-gn', 'nobody'], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    with open(work + '/conf.toml', 'w') as f:
        f.write('[features]\nposix_fallocate = {}\nrename_ctime = {}\nstat_st_birthtime = {}\nutime_now = {}\nutimensat = {}\n'
                '[settings]\nnaptime = 0.02\nallow_remount = false\nexpected_failures = []\n'
                '[dummy_auth]\nentries = [["nobody", "%s"], ["daemon", "daemon"]]\n' % group)


def run(where):
    """All tests below a directory: (names that failed, the summary)."""
    second = work + '/s'
    os.makedirs(second, exist_ok=True)
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'mode=755', 'second', second], check=True)
    config(second)
    t = work + '/t'
    os.makedirs(t, exist_ok=True)
    inner = where + '/pjd'
    os.mkdir(inner, 0o755)
    os.chmod(inner, 0o755)
    subprocess.run(['mount', '--bind', inner, t], check=True)
    try:
        p = subprocess.run([tool, '-c', work + '/conf.toml', '-p', t, '-s', second, *patterns], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, errors='replace', timeout=1500)
    finally:
        subprocess.run(['umount', t])
        subprocess.run(['umount', second])
    out = re.sub(r'\x1b\[[0-9;]*m', '', p.stdout)
    failed = {}
    lines = out.splitlines()
    for i, line in enumerate(lines):
        m = re.match(r'(\S+)\s+.*FAILED', line) or re.match(r'(\S+)\s.*\bfailed\b', line)
        if m and '::' in m.group(1):
            failed[m.group(1)] = ' '.join(x.strip() for x in lines[i + 1:i + 3])
    summary = [l for l in lines if 'Summary' in l or re.match(r'\s*Tests?:', l)]
    if not summary:
        raise SystemExit('pjdfstest said:\n' + out[-3000:])
    return failed, re.sub(' +', ' ', ' '.join(summary[-1].split()))


rc = 2
try:
    fs = lab.make_fs(kind, work)
    os.chmod(fs, 0o755)
    native_dir, src, dst, at = fs + '/native', fs + '/src', fs + '/dst', work + '/m'
    for d in (native_dir, src, dst, at):
        os.mkdir(d, 0o755)
        os.chmod(d, 0o755)
    lab.fill_src(src, 'pjd', 2, 200)
    os.chmod(src, 0o755)
    native, summary = run(native_dir)
    print('native %s: %s' % (kind, summary), flush=True)
    args = ['--no-background'] if os.environ.get('PENDING') else []
    # Programs and devices below the mount must work as they do below it.
    mount = lab.Mount(src, dst, at, work + '/log', args + ['-o', 'dev,suid'])
    try:
        if not args:
            mount.wait_complete()
        ours, summary = run(at)
        print('mirrorfs:    %s' % summary)
    finally:
        mount.stop()
    only = sorted(set(ours) - set(native))
    expected = [l.split()[0] for l in open(here + '/pjdfstest.expected') if l.strip() and not l.startswith('#')]
    for name in only:
        print('only the mount fails%s: %s %s' % (' (expected)' if name in expected else '', name, ours[name]))
    passed = [n for n in expected if n not in ours]
    for name in passed:
        print('expected to fail, and passed: ' + name)
    rc = 1 if set(only) - set(expected) or (passed and not patterns) else 0
    print('%d failures that the native %s has not, %d expected' % (len(only), kind, len(expected)))
finally:
    lab.remove(work)
sys.exit(rc)
PY
