#!/usr/bin/env bash
# large.sh - large files beside what fio reaches sequentially on the same file system in the same run: the slower of its read
# and its write is the bound. On one file system and to another one; until the copy returns, and until it is on the device.
# As root. FS="ext4 xfs" (default ext4), ROUNDS=5, SCALE=1 (3 files of 512 MiB), DISK=yes: images on the disk below TMPDIR
# and a source that is not cached, instead of images in memory and a cached one. TOOLS as for compare.sh, OUT=FILE: JSON.
set -eu
case ${1:-} in -h | --help) sed -n '2,5s/^# //p' "$0"; exit 0 ;; esac
. "$(dirname "$0")/lab.sh"
need fio fio
exec python3 "$root/scripts/bench/large.py"
