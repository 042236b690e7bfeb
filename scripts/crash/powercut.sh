#!/usr/bin/env bash
# powercut.sh [STATES] - power failures, on each of ext4, xfs and btrfs (default 200 states each). As root.
# The disk below dst is logged write by write; afterwards it is put together as a power cut at a random moment would
# have left it, mounted, and checked:
#   WHAT=mount (the default; power.py): migrations. What had been promised by then holds: no synced write lost, nothing
#       deleted back, no wrong byte, and the resumed migration ends in a tree equal to what it must be.
#   WHAT=huge (huge-power.py): a huge directory of which some files are here and changed.
#   WHAT=sync (sync-power.py): `mirrorfs sync`. The same command once more makes dst equal to src, whatever was left.
# Needs the test kit's powercut.py (MIRRORFS_KIT); FS="ext4 xfs" chooses, SECONDS_EACH=15 is the length of a recording,
# SEED=1 the random seed, WORK=/dir a place with some GB.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
kit=${MIRRORFS_KIT:-$here/../../../shared/kit}
states=${1:-200}
case ${WHAT:-mount} in
  mount) script=$here/power.py ;;
  huge) script=$here/huge-power.py ;;
  sync) script=$here/sync-power.py ;;
  *) echo "WHAT is mount, huge or sync" >&2; exit 2 ;;
esac
[ -f "$kit/powercut.py" ] || { echo "no powercut.py: set MIRRORFS_KIT" >&2; exit 2; }
work=${WORK:-$(mktemp -d "${TMPDIR:-/tmp}/mirrorfs-power.XXXXXX")}
trap '[ -n "${WORK:-}" ] || rm -rf "$work"' EXIT
bad=0
for fs in ${FS:-ext4 xfs btrfs}; do
  # Several recordings, so that not all states are moments of one story.
  left=$states seed=${SEED:-1} total=0
  while [ "$left" -gt 0 ]; do
    n=$((left < 50 ? left : 50))
    rm -rf "$work/lab"
    mkdir -p "$work/lab"
    python3 "$script" prepare "$work/lab"
    start=$(date +%s)
    SEED=$seed python3 "$kit/powercut.py" run --work "$work/w" --fs "$fs" --disk wlog --states "$n" --seed "$seed" \
      --seconds "${SECONDS_EACH:-15}" --writer "exec python3 '$script' write '$work/lab'" \
      --checker "exec python3 '$script' check '$work/lab'" | tee "$work/out" | grep -v '^[0-9]* states' || true
    line=$(grep '^[0-9]* states' "$work/out" || echo "0 states, 1 bad")
    b=$(echo "$line" | sed 's/.* \([0-9]*\) bad/\1/')
    count() { cat "$work/lab/$1" 2>/dev/null | wc -l; }
    case ${WHAT:-mount} in
      huge) done="$(count log) lines of the log" ;;
      mount) done="$(count ops) operations" ;;
      sync) done="$(count hits) files that only looked complete after a cut" ;;
    esac
    echo "$fs: $line, seed $seed, $done, $(($(date +%s) - start)) s"
    case "$line" in "0 states"*) bad=$((bad + 1)); break ;; esac
    total=$((total + n)) bad=$((bad + b)) left=$((left - n)) seed=$((seed + 1))
  done
  echo "$fs: $total power cuts"
done
echo "$bad bad states in all"
[ "$bad" = 0 ]
