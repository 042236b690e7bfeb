#!/usr/bin/env bash
# fsx.sh [OPS] - random reads, writes, truncations, mappings, holes and copies on one file (default 100,000 operations).
# As root, on each of ext4, xfs and btrfs (FS="ext4 xfs" chooses):
#   fsx_pending.py, on files that started pending, against a model in memory;
#   fsx itself (cargo install fsx --version 0.3.2, or FSX=/path), which always starts from an empty file; without it
#   that part is left out, and under MIRRORFS_TEST_ALL=1 that is a failure.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
ops=${1:-100000}
for fs in ${FS:-ext4 xfs btrfs}; do
  python3 "$here/fsx_pending.py" --fs "$fs" --ops "$ops"
done
