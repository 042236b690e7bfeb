#!/bin/bash
# sync.sh [DIR] [ROUNDS]: a tree of 60,000 small files copied by mirrorfs sync, cp -a, rsync -aHAX
# and a tar pipe, in turn, warm cache, on the file system of DIR (default: an ext4 image of its own
# in memory, which needs root). Prints the median of ROUNDS (5) and the ratio to ours, both of the
# time on the clock and of the processor time (on a busy machine only that one means something).
# MIRRORFS names the program (default: target/release/mirrorfs). Nothing is flushed inside the
# measured time: none of the others does that either.
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
mirrorfs=${MIRRORFS:-$here/target/release/mirrorfs}
[ -x "$mirrorfs" ] || { echo "no $mirrorfs: cargo build --release" >&2; exit 2; }
work=${1:-} rounds=${2:-5} image=
if [ -z "$work" ]; then
    image=$(mktemp -d)
    mount -t tmpfs -o size=8g none "$image"
    truncate -s 6G "$image/ext4"; mkfs.ext4 -q "$image/ext4"; mkdir "$image/mnt"
    mount -o loop "$image/ext4" "$image/mnt"
    work=$image/mnt
fi
work=$work/mirrorfs-bench.$$; mkdir "$work"
finish() {
    rm -rf "$work"
    [ -z "$image" ] || { umount "$image/mnt"; umount "$image"; rmdir "$image"; }
}
trap finish EXIT
python3 - "$work" "$rounds" "$mirrorfs" <<'PY'
import math, os, random, resource, statistics, subprocess, sys, time
work, rounds, mirrorfs = sys.argv[1], int(sys.argv[2]), sys.argv[3]
src, dst = work + "/src", work + "/dst"

# The tree: sizes log-normal around 4 KiB, owners, modes, times, some links and xattrs.
rnd, pool = random.Random(3), random.Random(7).randbytes(4 << 20)
dirs = [src]
os.mkdir(src)
while len(dirs) < 4000:
    parent = rnd.choice(dirs[-1500:] if rnd.random() < .7 else dirs)
    if parent[len(src):].count("/") < 9:
        dirs.append(f"{parent}/d{len(dirs)}")
        os.mkdir(dirs[-1])
files = []
for i, d in enumerate(rnd.choices(dirs, [rnd.paretovariate(1.3) for _ in dirs], k=60000)):
    size = min(1 << 20, int(math.exp(math.log(4096) + 1.46 * rnd.gauss(0, 1))))
    files.append(f"{d}/f{i}")
    with open(files[-1], "wb") as f:
        at = rnd.randrange(len(pool) - size)
        f.write(pool[at:at + size])
        if os.geteuid() == 0:
            os.fchown(f.fileno(), *rnd.choice([(0, 0)] * 6 + [(1000, 1000), (33, 33)]))
        os.fchmod(f.fileno(), rnd.choice([0o644] * 12 + [0o755] * 3 + [0o600]))
        if i % 200 == 0:
            os.setxattr(f.fileno(), "user.origin", b"%d" % size)
    os.utime(files[-1], ns=(10**18 + i * 10**9 + 7, 10**18 + i * 10**9 + 9))
for i in range(300):
    os.link(rnd.choice(files), f"{rnd.choice(dirs)}/h{i}")
    os.symlink("f", f"{rnd.choice(dirs)}/l{i}")
os.sync()

ways = {
    "mirrorfs sync": [mirrorfs, "sync", "--fsync", "never", src, dst],
    "cp -a": ["cp", "-a", src, dst],
    "rsync -aHAX": ["rsync", "-aHAX", src + "/", dst + "/"],
    "tar | tar": ["sh", "-c", f"mkdir {dst} && tar -C {src} --xattrs --xattrs-include='*' -cf - . "
                  f"| tar -C {dst} --xattrs --xattrs-include='*' -xpf -"],
}
wall, cpu = {w: [] for w in ways}, {w: [] for w in ways}
for _ in range(rounds):
    for way, command in ways.items():
        subprocess.run(["rm", "-rf", dst], check=True)
        os.sync()
        # Somebody else may have dropped the caches.
        subprocess.run(["sh", "-c", f"tar -C {src} -cf - . | cat >/dev/null"], check=True)
        was, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run(command, check=True)
        wall[way].append(time.monotonic() - begin)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu[way].append(now.ru_utime + now.ru_stime - was.ru_utime - was.ru_stime)
subprocess.run(["rm", "-rf", dst], check=True)
subprocess.run(ways["mirrorfs sync"], check=True)
equal = subprocess.run([mirrorfs, "verify", src, dst], stdout=subprocess.DEVNULL).returncode
print("way              clock s  (min-max)       x ours   cpu s   x ours")
ours = statistics.median(wall["mirrorfs sync"]), statistics.median(cpu["mirrorfs sync"])
for way in ways:
    w, c = statistics.median(wall[way]), statistics.median(cpu[way])
    spread = f"({min(wall[way]):.2f}-{max(wall[way]):.2f})"
    print(f"{way:<16} {w:7.2f}  {spread:<14} {w / ours[0]:7.2f} {c:7.2f} {c / ours[1]:8.2f}")
print("copy verified: equal" if equal == 0 else f"copy verified: DIFFERENT (exit {equal})")
sys.exit(equal)
PY
