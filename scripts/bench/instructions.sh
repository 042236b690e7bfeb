#!/usr/bin/env bash
# instructions.sh [--baseline] - counts the instructions of the hot paths (benches/instructions.rs) and compares them with
# benches/baseline.json; 1 when one takes over 3 % more (LIMIT), 3 when the baseline is of another compiler or C library.
# --baseline writes it anew. BASE=COMMIT counts that commit first, here, and compares with it instead: for a machine
# that the baseline is not of. What a busy machine adds (some paths depend on the clock) is not blamed: a baseline is the
# median of 3 runs (RUNS), and a comparison that fails is made again, up to 3 runs. Works in memory (MIRRORFS_BENCH_DIR,
# default /dev/shm); as root, because of the mark's name.
set -eu
cd "$(dirname "$0")/../.."
case ${1:-} in '' | --baseline) ;; *) sed -n '2,8s/^# //p' "$0" >&2; exit 2 ;; esac
export MIRRORFS_BENCH_DIR=${MIRRORFS_BENCH_DIR:-/dev/shm}
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
baseline=benches/baseline.json

# count SOURCES RUN: the summaries end up in $target/gungraun/RUN.
count() {
    (cd "$1" && GUNGRAUN_HOME=$(realpath -m "$target/gungraun/$2") CARGO_TARGET_DIR=$target \
        cargo bench --locked --bench instructions -- --save-summary=json >"$log" 2>&1) ||
        { cat "$log" >&2; exit 2; }
}

# write SOURCES BASELINE: the median of all runs.
write() {
    rm -rf "$target/gungraun"
    for run in $(seq "$runs"); do count "$1" "$run"; done
    python3 scripts/bench/regress.py write "$target/gungraun" "$2"
}

runs=${RUNS:-3}
log=$(mktemp)
base=
cleanup() {
    rm -f "$log"
    [ -z "$base" ] || { git worktree remove --force "$base/tree"; rm -rf "$base"; }
}
trap cleanup EXIT
if [ -n "${BASE:-}" ]; then
    base=$(mktemp -d)
    git worktree add --quiet --detach "$base/tree" "$BASE"
    baseline=$base/baseline.json
    write "$base/tree" "$baseline" >/dev/null
elif [ "${1:-}" = --baseline ]; then
    write . "$baseline"
    exit
fi
rm -rf "$target/gungraun"
for run in $(seq "$runs"); do
    count . "$run"
    status=0
    python3 scripts/bench/regress.py compare "$target/gungraun" "$baseline" "${LIMIT:-3}" || status=$?
    [ $status = 1 ] || break
done
exit $status
