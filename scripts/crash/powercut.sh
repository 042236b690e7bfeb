#!/usr/bin/env bash
# powercut.sh [STATES] - power failures, on each of ext4, xfs and btrfs (default 200 states each). As root.
# The disk below dst is logged write by write; afterwards it is put together as a power cut at a random moment would
# have left it, mounted, and checked:
#   WHAT=mount (the default; power.py): migrations. What had been promised by then holds: no synced write lost, nothing
#       deleted back, no wrong byte, and the resumed migration ends in a tree equal to what it must be.
#   WHAT=huge (huge-power.py): a huge directory of which some files are here and changed.
#   WHAT=pending (the same): files that are written while they are pending.
#   WHAT=own (the same): new files in a huge directory of which nothing is here.
#   WHAT=adopt (the same): a directory that is adopted from an earlier copy, and changed.
#   WHAT=carried (carried-power.py): small files that the background brings.
#   WHAT=mixed (mixed-power.py): large files that are changed while most of them is pending. KIND=beside, whole, cut or grow: what breaks a
#       rule of theirs.
#   WHAT=salvage (salvage-power.py): files that src cannot give whole.
#   WHAT=mix (mix-power.py): mail, SQLite, git and logs, all at once, while a migration runs. MIX="mail sql wal git log postgres"
#       chooses; PLAIN=1 does it without mirrorfs.
#   WHAT=sync (sync-power.py): `mirrorfs sync`. The same command once more makes dst equal to src, whatever was left.
# A state is what was flushed and any part of what was not: none, all, a prefix, a random half, a random half with one
# write torn, all but one, only one (the loop device has no FUA of its own: each such write is followed by a flush).
# Needs the test kit's powercut.py (MIRRORFS_KIT). FS="ext4 ext4-writeback xfs btrfs" chooses, SECONDS_EACH=15 is the length
# of a recording, EACH=50 how many states are made of one, POLICY=random,torn which, SEED=1 the random seed, WORK=/dir a place with some GB (default: in memory).
# KEEP=1: with --keep-mount (not WHAT=sync). The daemon is killed again and again while the workload runs, another one goes on each time, and no
#   operation may fail. KILL_AT="point:n ..." chooses fault points at which it is killed besides.
# NOISE=1: somebody else has the journal of the disk committed all the time.
# MIRRORFS_BREAK=D1 (with a program built with --features fault) breaks a rule of docs/DURABILITY.md: then there must be
# bad states, and none is the failure.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
kit=${MIRRORFS_KIT:-$here/../../../shared/kit}
states=${1:-200}
case ${WHAT:-mount} in
  mount) script=$here/power.py ;;
  huge) script=$here/huge-power.py ;;
  adopt | own | pending) script=$here/huge-power.py; export KIND=$WHAT ;;
  carried) script=$here/carried-power.py ;;
  mixed) script=$here/mixed-power.py ;;
  salvage) script=$here/salvage-power.py ;;
  mix) script=$here/mix-power.py ;;
  sync) script=$here/sync-power.py ;;
  *) echo "WHAT is mount, huge, own, carried, pending, adopt, mixed, salvage, mix or sync" >&2; exit 2 ;;
esac
[ -f "$kit/powercut.py" ] || { echo "no powercut.py: set MIRRORFS_KIT" >&2; exit 2; }
# Every state is synced to a disk again and again: in memory that is several times as fast.
place() {
  free=$(awk '/^MemAvailable/ { print int($2 / 1048576) }' /proc/meminfo)
  room=$(df --output=avail -BG /dev/shm 2>/dev/null | tr -dc 0-9)
  if [ "$free" -ge 8 ] && [ "${room:-0}" -ge 8 ]; then echo /dev/shm; else echo /tmp; fi
}
work=${WORK:-$(mktemp -d "${TMPDIR:-$(place)}/mirrorfs-power.XXXXXX")}
trap '[ -n "${WORK:-}" ] || rm -rf "$work"' EXIT
chmod 755 "$work"       # PostgreSQL is not root
export MIRRORFS_RUN_DIR=$work/run MIRRORFS_STATE_DIR=$work/run   # No other daemon is asked.
bad=0
options() {
  case $1 in
    ext4-writeback) echo "--mount-opts data=writeback" ;;
    ext4-fast) echo "--mkfs-opts=-Ofast_commit" ;;
  esac
}
for fs in ${FS:-ext4 ext4-writeback xfs btrfs}; do
  # Several recordings, so that not all states are moments of one story.
  left=$states seed=${SEED:-1} total=0
  while [ "$left" -gt 0 ]; do
    n=$((left < ${EACH:-50} ? left : ${EACH:-50}))
    rm -rf "$work/lab" "$work/failed"
    mkdir -p "$work/lab"
    python3 "$script" prepare "$work/lab"
    start=$(date +%s)
    SEED=$seed MIRRORFS_KIT=$kit python3 "$here/cut.py" run --work "$work/w" --fs "${fs%%-*}" $(options "$fs") --disk wlog --size 4e9 --states "$n" --seed "$seed" \
      --seconds "${SECONDS_EACH:-15}" --policy "${POLICY:-none,all,prefix,random,torn,but-one,one}" --writer "python3 '$script' write '$work/lab' || touch '$work/failed'" \
      --checker "exec python3 '$script' check '$work/lab'" | tee "$work/out" | grep -v '^[0-9]* states' || true
    [ ! -e "$work/failed" ] || { echo "$fs: the writer failed" >&2; exit 2; }
    line=$(grep '^[0-9]* states' "$work/out" || echo "0 states, 1 bad")
    b=$(echo "$line" | sed 's/.* \([0-9]*\) bad/\1/')
    count() { cat "$work/$1" 2>/dev/null | wc -l; }
    promised=$(count w/acked)
    done="$promised promises before the last cut"
    if [ -n "${KEEP:-}" ]; then
      kills=$(grep -c 'another one goes on' "$work/lab/log") || { echo "$fs: no daemon was killed" >&2; exit 2; }
      # At the end both are killed, the keeper perhaps first.
      ! grep 'is not kept\|mount is dead' "$work/lab/log" | grep -v 'its keeper is gone' >&2 || exit 2
      done="$done, $kills kills"
    fi
    [ "${WHAT:-mount}" != sync ] || done="$done, $(count lab/hits) files that only looked complete after a cut"
    echo "$fs: $line, seed $seed, $done, $(($(date +%s) - start)) s"
    case "$line" in "0 states"*) exit 2 ;; esac
    [ "$promised" != 0 ] || { echo "nothing was promised: SECONDS_EACH is too short" >&2; exit 2; }
    total=$((total + n)) bad=$((bad + b)) left=$((left - n)) seed=$((seed + 1))
  done
  echo "$fs: $total power cuts"
done
echo "$bad bad states in all"
if [ -n "${MIRRORFS_BREAK:-}" ]; then
  echo "rule $MIRRORFS_BREAK was broken"
  [ "$bad" != 0 ]
else
  [ "$bad" = 0 ]
fi
