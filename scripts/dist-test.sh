#!/bin/sh
# dist-test.sh - installs target/dist's .deb on this machine, migrates a tree with what it installed, and purges it again;
# then the same with the .rpm in a root of its own (dist-test-rpm.sh), if rpm is there.
# As root, on Debian. lintian looks at the .deb first, if it is there.
set -eu
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "dist-test.sh: must be root: it installs a package and mounts" >&2; exit 2; }
deb=$(ls target/dist/*.deb)
if dpkg-query -W mirrorfs >/dev/null 2>&1; then
    echo "dist-test.sh: mirrorfs is installed already: not touched" >&2
    exit 2
fi
if command -v lintian >/dev/null; then
    # Not an upload to Debian: nobody has asked for it there.
    lintian --allow-root --suppress-tags initial-upload-closes-no-bugs --fail-on error,warning "$deb"
    echo "lintian: clean"
fi
work=$(mktemp -d)
end() {
    umount -l "$work/dst" 2>/dev/null || true
    dpkg --purge mirrorfs >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap end EXIT
trap 'exit 1' INT TERM
export DEBIAN_FRONTEND=noninteractive
apt-get install -y "./$deb" >"$work/apt" 2>&1 || { cat "$work/apt"; exit 1; }

mirrorfs --version
for page in mirrorfs mirrorfs-mount mirrorfs-sync mount.mirrorfs; do
    zcat /usr/share/man/man[18]/$page.[18].gz | grep -q . || { echo "no man page of $page" >&2; exit 1; }
done
bash -c '. /usr/share/bash-completion/completions/mirrorfs && complete -p mirrorfs' >/dev/null
systemd-analyze verify /usr/lib/systemd/system/mirrorfs@.service 2>/dev/null || echo "dist-test: systemd-analyze does not take the unit here"

mkdir "$work/src" "$work/dst"
cp -a /usr/share/doc/mirrorfs "$work/src/doc"
cp -a /etc/alternatives "$work/src/links"
# As fstab would: mount(8) finds the helper.
timeout 60 mount -t mirrorfs "$work/src" "$work/dst"
grep -q "migrat" "$work/dst/doc/README.md"* || zgrep -q migrat "$work"/dst/doc/README.md*
timeout 60 mirrorfs wait "$work/dst"
timeout 60 mirrorfs finish "$work/dst"
timeout 60 mirrorfs verify "$work/src" "$work/dst"
dpkg --purge mirrorfs >/dev/null
[ ! -e /usr/sbin/mount.mirrorfs ] && [ ! -e /usr/bin/mirrorfs ]
echo "dist-test: installed, migrated, verified, purged"
if command -v rpm >/dev/null; then
    scripts/dist-test-rpm.sh
else
    echo "dist-test: the .rpm was not tried: no rpm here"
fi
