#!/usr/bin/env bash
# demo.sh - migrates a real tree through the mount while something reads from it. As root.
# A copy of parts of /usr (FILES=20000 files at least) is SRC; DST is empty and is mounted over.
# Everything happens in one temporary directory (below TMPDIR) and is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

FILES=${FILES:-20000}
LIMIT=${LIMIT:-600} # seconds, for the migration

if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "demo: mounting needs root" >&2; exit 1; }
    cargo build --release --locked
    exec sudo --preserve-env=FILES,LIMIT,TMPDIR,CARGO_TARGET_DIR env DEMO_BUILT=1 "$0" "$@"
fi
[ -n "${DEMO_BUILT:-}" ] || cargo build --release --locked
bin=${MIRRORFS:-${CARGO_TARGET_DIR:-target}/release/mirrorfs}
[ -x "$bin" ] || { echo "demo: no $bin" >&2; exit 1; }
bin=$(realpath "$bin")

# On a disk where marks can be kept: /tmp may be a tmpfs.
work=$(mktemp -d "${TMPDIR:-/var/tmp}/mirrorfs-demo.XXXXXX")
src=$work/old dst=$work/new
export MIRRORFS_RUN_DIR=$work/run MIRRORFS_STATE_DIR=$work/run
daemon=

cleanup() {
    status=$?
    trap - EXIT INT TERM
    if [ -n "$daemon" ] && kill -0 "$daemon" 2>/dev/null; then
        kill -TERM "$daemon" 2>/dev/null || true
        for _ in $(seq 50); do kill -0 "$daemon" 2>/dev/null || break; sleep 0.1; done
        kill -KILL "$daemon" 2>/dev/null || true
    fi
    for _ in 1 2 3; do
        grep -q " $dst " /proc/self/mountinfo || break
        umount -l "$dst" 2>/dev/null || break
    done
    if grep -q " $dst " /proc/self/mountinfo; then
        echo "demo: $dst is still mounted; $work is left as it is" >&2
        exit 1
    fi
    if [ "$status" != 0 ] && [ -d "$work/run" ]; then
        echo "demo: failed; the daemon's log ends with:" >&2
        tail -n 20 "$work"/run/*.log >&2 2>/dev/null || true
    fi
    rm -rf --one-file-system "$work"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "${*//$bin/mirrorfs}"; timeout "$LIMIT" "$@"; }
# GNU date and awk: seconds with two digits since $1.
since() { awk -v a="$1" -v b="$(date +%s.%N)" 'BEGIN { printf "%.2f", b - a }'; }

say "1. A tree to migrate: parts of /usr, at least $FILES files"
mkdir -p "$src" "$dst"
have=0
copy() {
    [ -e "$1" ] || return 0
    mkdir -p "$src/$(dirname "$1")"
    cp -a --reflink=never "$1" "$src/$(dirname "$1")/" 2>/dev/null || true
    have=$(find "$src" -type f | wc -l)
}
for part in /usr/share/doc /usr/share/perl /usr/lib/python3 /usr/share/zoneinfo /usr/share/man \
    /usr/share /usr/include /usr/lib/python3.* /usr/lib/x86_64-linux-gnu /usr/lib; do
    copy "$part"
    [ "$have" -ge "$FILES" ] && break
done
# A small machine: the same again, until there are enough.
round=0
while [ "$have" -lt "$FILES" ] && [ "$round" -lt 50 ]; do
    round=$((round + 1))
    mkdir -p "$src/again/$round"
    cp -a --reflink=never /usr/share "$src/again/$round/" 2>/dev/null || true
    have=$(find "$src" -type f | wc -l)
done
[ "$have" -ge "$FILES" ] || { echo "demo: only $have files in /usr" >&2; exit 1; }
echo "$have files, $(du -sh --apparent-size "$src" | cut -f1)"

say "2. Mount: usable before anything was copied"
begin=$(date +%s.%N)
run "$bin" mount "$src" "$dst"
echo "usable after $(since "$begin") s"
daemon=$("$bin" status "$dst" --json | sed -n 's/^ *"pid": *\([0-9]*\).*/\1/p')
begin=$(date +%s.%N)
ls -l "$dst" >/dev/null
echo "first ls -l after $(since "$begin") s"
one=$(cd "$src" && find . -type f -size -64k | sed -n 1000p)
begin=$(date +%s.%N)
cmp "$src/$one" "$dst/$one"
echo "first file read after $(since "$begin") s: $one"

say "3. Work in it while it is copied: read random files"
(cd "$src" && find . -type f | shuf -n 500 --random-source=<(yes)) >"$work/list"
(
    cd "$dst"
    while IFS= read -r file; do cat -- "$file" >/dev/null || echo "demo: cannot read $file" >&2; done
) <"$work/list" &
reader=$!
state=
end=$((SECONDS + LIMIT))
while :; do
    json=$("$bin" status "$dst" --json)
    state=$(printf '%s' "$json" | sed -n 's/^ *"state": *"\([A-Z]*\)".*/\1/p')
    field() { printf '%s' "$json" | sed -n "s/^ *\"$1\": *\\([0-9]*\\).*/\\1/p"; }
    printf '%-10s files %s of %s   %s MiB of %s MiB   on access %s files   errors %s\n' "$state" \
        "$(field files_pulled)" "$(field files_seen)" "$(($(field bytes_pulled) >> 20))" \
        "$(($(field bytes_seen) >> 20))" "$(field demand_files)" "$(field errors)"
    case $state in COMPLETE) break ;; DEGRADED)
        "$bin" errors "$dst" | head -n 20 >&2
        exit 1
        ;;
    esac
    [ "$SECONDS" -lt "$end" ] || { echo "demo: not complete after $LIMIT s" >&2; exit 1; }
    sleep 0.5
done
wait "$reader"
run "$bin" status "$dst"

say "4. Finish: the mount goes away, the plain tree stays at the same path"
run "$bin" finish "$dst"
for _ in $(seq 100); do kill -0 "$daemon" 2>/dev/null || break; sleep 0.1; done
daemon=
if grep -q " $dst " /proc/self/mountinfo; then echo "demo: $dst is still mounted" >&2; exit 1; fi

say "5. Verify: every byte, all metadata"
run "$bin" verify "$src" "$dst"
say "Done: zero differences."
