#!/bin/sh
# A tree copied by N processes of GNU parallel, on this machine or, with --sshlogin, on several.
# Use: parallel.sh N SRC DST. Run it again to make good what failed, or what has changed.
set -eu
n=$1 src=$2 dst=$3
seq "$n" | parallel --will-cite --jobs "$n" mirrorfs sync --shard "{}/$n" "$src" "$dst"
