#!/usr/bin/env bash
# scaling.sh [PLACE...] - mirrorfs sync with 1, 2, 4 ... 32 workers (JOBS): clock, processor seconds, context switches, futex
# calls and instructions for each file, so that a lock on the path of a file would be seen. As root.
# PLACE: memory (small files, FS, default ext4, an image in memory) and slow1 (5,000 files on a source of 1 ms for each
# request; see compare.sh for what that needs, SLOWFS=PROGRAM if it is built already), beside the bound: requests x latency /
# workers. slow5 too. Default: memory and slow1.
# ROUNDS=5, SCALE=0.2 (of compare.sh's trees), COUNT=no leaves out what strace and callgrind count (they need no quiet
# machine), TIME=no leaves out the rounds.
set -eu
case ${1:-} in -h | --help) sed -n '2,8s/^# //p' "$0"; exit 0 ;; esac
. "$(dirname "$0")/lab.sh"
if [ "${COUNT:-yes}" = yes ]; then
    need strace strace
    need valgrind valgrind
fi
SCALE=${SCALE:-0.2} exec python3 "$root/scripts/bench/scaling.py" "$@"
