#!/usr/bin/env bash
# neighbours.sh - what a copy of more than memory does to others on the machine. A process reads its own cached file at random
# while each tool copies a tree; both are in a cgroup whose memory limit is a third of the tree: a model of a small machine,
# in which the page cache of both is charged to the limit. Prints the p50 and p99 of the reads before and during the copy, how
# much of the file is still cached after it (fincore), and how much of src and dst is in the page cache. As root, on the
# file system of DIR (default TMPDIR), not a tmpfs; the tools as for compare.sh, mirrorfs sync with each --cache it has.
# LIMIT_MIB=512 (the tree is three times that), WORK_MIB=96 (the file), ROUNDS=3.
set -eu
case ${1:-} in -h | --help) sed -n '2,7s/^# //p' "$0"; exit 0 ;; esac
. "$(dirname "$0")/lab.sh"
need fincore util-linux
exec python3 "$root/scripts/bench/neighbours.py"
