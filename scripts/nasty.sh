#!/usr/bin/env bash
# nasty.sh [FS...] - a tree with every awkward thing (the kit's nasty.py) through mount and finish, and through sync.
# As root, on loop file systems: by default ext4, xfs and btrfs. For each: reading nothing, a random half, and everything
# through the mount while the walker runs; then finish, and the kit's treecmp.py says what differs. Exit 0: nothing does.
# Needs the test kit (MIRRORFS_KIT); MIRRORFS=/path/to/mirrorfs.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec python3 - "$here" "$@" <<'PY'
import json, os, random, subprocess, sys, time
here, kinds = sys.argv[1], sys.argv[2:] or ['ext4', 'xfs', 'btrfs']
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(here, 'crash'))
import lab

nasty, treecmp = lab.kit('nasty.py'), lab.kit('treecmp.py')
if not nasty or not treecmp:
    lab.die('no nasty.py: set MIRRORFS_KIT')
LIMIT = 900
lab.own_namespace()
work = lab.scratch('mirrorfs-nasty.')
failed = []


def sh(*cmd, **kw):
    return subprocess.run(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT, **kw)


def must(*cmd):
    p = sh(*cmd)
    if p.returncode:
        raise SystemExit('%s: %s' % (' '.join(cmd), p.stdout.decode(errors='replace')[-2000:]))
    return p.stdout.decode(errors='replace')


def read_some(at, share, rnd):
    """Lists all directories of the mount and reads a share of the files; by directory fds: paths are longer than PATH_MAX."""
    stack, count = [os.open(at, os.O_RDONLY | os.O_DIRECTORY)], 0
    while stack:
        fd = stack.pop()
        try:
            for e in os.scandir(fd):
                if e.is_dir(follow_symlinks=False) and len(stack) < 8000:
                    stack.append(os.open(e.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd))
                elif e.is_file(follow_symlinks=False) and rnd.random() < share:
                    f = os.open(e.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd)
                    # The data, not the terabyte of holes around it.
                    size, at_byte = os.fstat(f).st_size, 0
                    while at_byte < size:
                        try:
                            at_byte = os.lseek(f, at_byte, os.SEEK_DATA)
                        except OSError:
                            break
                        piece = os.pread(f, 1 << 20, at_byte)
                        if not piece:
                            break
                        at_byte += len(piece)
                    os.close(f)
                    count += 1
        finally:
            os.close(fd)
    return count


def compare(kind, what, src, dst, began, count):
    p = sh(sys.executable, treecmp, '--flags', '--holes', 'more', src, dst)
    line = p.stdout.decode(errors='replace').strip().splitlines()[-1]
    print('%-5s %-16s %6d files read  %5.0f s  %s' % (kind, what, count, began, line), flush=True)
    if p.returncode:
        failed.append((kind, what))
        print(p.stdout.decode(errors='replace')[:3000])


def through_mount(kind, share, src, dst, at):
    rnd, t = random.Random(7), time.time()
    os.makedirs(dst)
    must(lab.binary(), 'mount', src, dst, at)
    try:
        count = read_some(at, share, rnd) if share else 0
        while True:
            status = json.loads(must(lab.binary(), 'status', at, '--json'))
            status = status[0] if isinstance(status, list) else status
            if status['state'] in ('COMPLETE', 'DEGRADED') or time.time() - t > LIMIT:
                break
            time.sleep(0.2)
        took = time.time() - t
        must(lab.binary(), 'finish', at)
    finally:
        sh('umount', '-l', at)
    compare(kind, 'mount, %d %%' % (share * 100), src, dst, took, count)


try:
    os.makedirs(work + '/mnt')
    for kind in kinds:
        # Inodes for four times the tree: ext4 has one for each 16 KiB.
        a, b = (lab.make_fs(kind, '%s/%s-%s' % (work, kind, side), 8 << 30) for side in ('src', 'dst'))
        must(sys.executable, nasty, a + '/src', '--flags')
        for i, share in enumerate((0, 0.5, 1)):
            through_mount(kind, share, a + '/src', '%s/dst%d' % (b, i), work + '/mnt')
        t = time.time()
        must(lab.binary(), 'sync', a + '/src', b + '/sync')
        compare(kind, 'sync', a + '/src', b + '/sync', time.time() - t, 0)
        for at in (a, b):
            sh('umount', '-l', at)
finally:
    lab.remove(work)
print('%d of %d differ' % (len(failed), 4 * len(kinds)))
sys.exit(1 if failed else 0)
PY
