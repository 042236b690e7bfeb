#!/usr/bin/env bash
# compare.sh [WORKLOAD...] - whole-tree copies by mirrorfs sync and by the tools that one would take instead. As root.
# Workloads: small (60,000 files), tiny (200,000 files in 20 directories), wide (1,000,000 files in one directory, most of
# them empty), links (1,000,000 names of 10,000 inodes), large, same (large, within one file system), shared (500 files of
# 4 MiB and 6,000 small ones within xfs or btrfs: reflinks), sparse, cold (small, nothing cached, the image on a disk and
# read with O_DIRECT), slow1 and slow5 (5,000 files, 1 and 5 ms for each request; needs the test kit's slowfs.c,
# MIRRORFS_KIT, gcc and libfuse3-dev, or SLOWFS=PROGRAM). Default: all of them.
# Tools: mirrorfs sync --fsync never, cp -a, rsync -aHAX, tar, xcp, fcp, rclone, fpsync. What is missing is installed (apt:
# rsync rclone fpart; cargo install: xcp fcp) unless INSTALL=no, and left out if that fails.
# FS="ext4 xfs btrfs tmpfs" chooses the file systems (default ext4; slow sources and cold: of dst), ROUNDS=5, SCALE=0.1
# makes the trees smaller, ROOM=12g the memory for the images, TOOLS="mirrorfs fcp" chooses, OUT=FILE takes the results
# as JSON. Each round runs all tools in turn, each on a new file system; nothing is flushed inside the measured time: no
# other tool does it.
# What a tool loses is asked once: by the kit's treecmp.py, or by mirrorfs verify, on a tree with everything in it.
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
target=${CARGO_TARGET_DIR:-$here/target}
export MIRRORFS=${MIRRORFS:-$target/release/mirrorfs}
export MIRRORFS_KIT=${MIRRORFS_KIT:-$here/../shared/kit}
export OUT=${OUT:-$target/bench-compare.json} PATH=$PATH:${HOME:-/root}/.cargo/bin:/usr/sbin
case ${1:-} in -h | --help) sed -n '2,15s/^# //p' "$0"; exit 0 ;; esac
[ "$(id -u)" = 0 ] || { echo "compare.sh: must be root: it mounts and makes owners" >&2; exit 2; }
[ -x "$MIRRORFS" ] || { echo "no $MIRRORFS: cargo build --release" >&2; exit 2; }
if [ "${INSTALL:-yes}" = yes ]; then
    for pair in rsync:rsync rclone:rclone fpsync:fpart strace:strace; do
        command -v "${pair%%:*}" >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -qy "${pair#*:}" >/dev/null ||
            echo "compare.sh: no ${pair%%:*}" >&2
    done
    for crate in xcp fcp; do
        command -v $crate >/dev/null || cargo install -q --locked $crate || echo "compare.sh: no $crate" >&2
    done
fi
exec python3 "$here/scripts/bench/compare.py" "$@"
