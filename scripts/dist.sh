#!/bin/sh
# dist.sh - builds the packages of this version: target/dist/*.deb, *.rpm, *.tar.gz and SHA256SUMS.
# The binary in .deb and .rpm is the usual one; the tarball's is static (musl), where that target is installed.
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:${HOME:-/root}/.cargo/bin
target=${CARGO_TARGET_DIR:-target}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
arch=$(uname -m)
for tool in cargo-deb cargo-generate-rpm; do
    command -v $tool >/dev/null || cargo install --locked $tool
done
cargo build --release --locked
stage=target/stage dist=target/dist
rm -rf "$stage" "$dist"
mkdir -p "$stage" "$dist"
MIRRORFS=$(cd "$target/release" && pwd)/mirrorfs
export MIRRORFS

scripts/install.sh "$PWD/$stage" /usr
strip "$stage/usr/bin/mirrorfs"
# Debian's form of the one line that it wants; what changed is in CHANGELOG.md.
stamp=$(git log -1 --format=%cD 2>/dev/null || date -R)
printf 'mirrorfs (%s-1) unstable; urgency=medium\n\n  * See changelog.gz.\n\n -- %s  %s\n' \
    "$version" "mirrorfs maintainers <maintainers@mirrorfs.example>" "$stamp" >"$stage/changelog"
{
    cat LICENSE
    printf '\nOn Debian the Apache License, Version 2.0 is in /usr/share/common-licenses/Apache-2.0.\n'
} >"$stage/license"
cargo deb --quiet --no-build --no-strip --output "$dist/"

# One asset a file: cargo-generate-rpm knows no trees.
assets=$(cd "$stage" && find usr -type f | sort | while read -r file; do
    mode=644
    [ -x "$file" ] && mode=755
    printf '{ source = "%s/%s", dest = "/%s", mode = "%s" },' "$stage" "$file" "$file" "$mode"
done)
cargo generate-rpm --auto-req builtin --set-metadata "assets = [$assets]" --output "$dist/"

tree=mirrorfs-$version-$arch
kind=$arch-unknown-linux-musl
if rustc --print target-libdir --target "$kind" 2>/dev/null | xargs test -d; then
    cargo build --release --locked --target "$kind"
    cp "$target/$kind/release/mirrorfs" "$stage/usr/bin/mirrorfs"
    strip "$stage/usr/bin/mirrorfs"
else
    echo "dist: no $kind (rustup target add $kind): the tarball's binary needs this machine's C library" >&2
fi
mv "$stage/usr" "$stage/$tree"
tar -C "$stage" --sort=name --owner=0 --group=0 --numeric-owner -czf "$dist/$tree.tar.gz" "$tree"
(cd "$dist" && sha256sum -- * >SHA256SUMS)
ls -l "$dist"
