#!/bin/sh
# install.sh DESTDIR PREFIX - puts everything that a package holds below DESTDIR/PREFIX; MIRRORFS is the program.
# `make install` calls it. The mount helper and the unit go where mount(8) and systemd look for them.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
prefix=$1$2 share=$1$2/share
install -D -m 755 "$MIRRORFS" "$prefix/bin/mirrorfs"
install -d "$prefix/sbin" "$share/man/man1" "$share/man/man8" "$share/bash-completion/completions" \
    "$share/zsh/vendor-completions" "$share/fish/vendor_completions.d"
ln -sfn ../bin/mirrorfs "$prefix/sbin/mount.mirrorfs"

commands=$("$MIRRORFS" --help | awk '/^Commands:/ { on = 1; next } /^$/ { on = 0 } on && $1 != "help" { print $1 }')
"$MIRRORFS" man >"$share/man/man1/mirrorfs.1"
for command in $commands; do
    "$MIRRORFS" man "$command" >"$share/man/man1/mirrorfs-$command.1"
done
echo ".so man1/mirrorfs-mount.1" >"$share/man/man8/mount.mirrorfs.8"
for page in "$share"/man/man1/mirrorfs*.1 "$share"/man/man8/mount.mirrorfs.8; do
    gzip -9nf "$page"
done
"$MIRRORFS" completions bash >"$share/bash-completion/completions/mirrorfs"
"$MIRRORFS" completions zsh >"$share/zsh/vendor-completions/_mirrorfs"
"$MIRRORFS" completions fish >"$share/fish/vendor_completions.d/mirrorfs.fish"

cd "$here"
install -D -m 644 "examples/systemd/mirrorfs@.service" "$prefix/lib/systemd/system/mirrorfs@.service"
doc=$share/doc/mirrorfs
install -d "$doc"
gzip -9nc CHANGELOG.md >"$doc/changelog.gz"
for file in README.md docs/*.md docs/*.json docs/*.varlink docs/*.svg \
    examples/mirrorfs.toml examples/systemd/* examples/shards/* examples/prometheus/* examples/grafana/*; do
    install -D -m 644 "$file" "$doc/$file"
done
