# lab.sh - sourced by the benches of this directory: what compare.py, on which they build, has to be told.
# shellcheck shell=bash
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
export MIRRORFS=${MIRRORFS:-$target/release/mirrorfs}
export MIRRORFS_KIT=${MIRRORFS_KIT:-$root/../shared/kit}
export PATH=$PATH:${HOME:-/root}/.cargo/bin:/usr/sbin
name=$(basename "$0")
[ "$(id -u)" = 0 ] || { echo "$name: must be root: it mounts" >&2; exit 2; }
[ -x "$MIRRORFS" ] || { echo "$name: no $MIRRORFS: cargo build --release" >&2; exit 2; }

# need PROGRAM PACKAGE: installs it, unless INSTALL=no.
need() {
    command -v "$1" >/dev/null && return
    [ "${INSTALL:-yes}" = yes ] && DEBIAN_FRONTEND=noninteractive apt-get install -qy "$2" >/dev/null && return
    echo "$name: no $1" >&2
    exit 2
}
