#!/usr/bin/env bash
# coverage.sh [run FILTER... | report | clean] - which lines the tests run (as root; default: everything, then the report).
# Daemons count too, also those that are killed, that exit at a fault point and that run as another user: their counters
# are mapped from files (LLVM's continuous mode), so nothing has to be written at the end.
# `run FILTER...` runs some of the integration tests, and adds to what was run before; RUN_LIB=1 the unit tests and loom too.
set -euo pipefail
cd "$(dirname "$0")/.."
rustup component list --installed 2>/dev/null | grep -q llvm-tools || rustup component add llvm-tools
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/coverage
raw=$CARGO_TARGET_DIR/raw
mkdir -p "$raw"
chmod 1777 "$raw"
# Our own crate only, as cargo-llvm-cov does it. Where the counters are is looked up at run time: without that they
# cannot be mapped from a file.
export RUSTC_WORKSPACE_WRAPPER=$CARGO_TARGET_DIR/rustc.sh
printf '#!/bin/sh\nexec "$@" -Cinstrument-coverage -Cllvm-args=-runtime-counter-relocation\n' >"$RUSTC_WORKSPACE_WRAPPER"
chmod +x "$RUSTC_WORKSPACE_WRAPPER"
# One file for each binary, shared by all its processes; another user's have their own.
export LLVM_PROFILE_FILE=$raw/%c%m.profraw
umask 0
run() {
  if [ -n "${RUN_LIB:-}" ]; then
    cargo test --locked --features fault --lib --test loom
  fi
  cargo test --locked --features fault --test it -- "$@"
}
report() {
  tools=$(rustc --print target-libdir)/../bin
  "$tools/llvm-profdata" merge -sparse "$raw"/*.profraw -o "$CARGO_TARGET_DIR/all.profdata"
  objects=("$CARGO_TARGET_DIR/debug/mirrorfs")
  for test in "$CARGO_TARGET_DIR"/debug/deps/{mirrorfs,it,loom}-*; do
    [[ -x $test && $test != *.* ]] && objects+=(--object "$test")
  done
  "$tools/llvm-cov" report "${objects[@]}" -instr-profile "$CARGO_TARGET_DIR/all.profdata" \
    --ignore-filename-regex '(/tests/|/tests\.rs|\.cargo/|/rustc/|/library/)' --show-region-summary=0 --show-branch-summary=0 |
    sed "s|$PWD/||"
}
case ${1:-all} in
  run) shift; run "$@" ;;
  report) report ;;
  clean) rm -rf "$raw" ;;
  all) rm -rf "$raw"; mkdir -p "$raw"; chmod 1777 "$raw"; RUN_LIB=1 run; report ;;
  *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
esac
