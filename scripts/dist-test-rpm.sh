#!/bin/sh
# dist-test-rpm.sh - installs target/dist's .rpm with rpm(8) over this machine's files, in a root of its own (an overlay in
# memory: nothing of the machine is changed), migrates a tree there with what it installed, and takes it off again. As root.
# What it requires is looked for among this machine's libraries: rpm's database in that root is empty.
set -eu
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "dist-test-rpm.sh: must be root: it mounts" >&2; exit 2; }
[ "${1:-}" = inside ] || exec unshare --mount --propagation private "$0" inside
rpm=$(ls "$PWD"/target/dist/*.rpm)
fail() { echo "dist-test-rpm: $*" >&2; exit 1; }

for needed in $(rpm -qp --requires "$rpm" | sed -n 's/^\([^ (]*[.]so[.0-9]*\)(.*/\1/p' | sort -u); do
    ldconfig -p | grep -q "^[[:space:]]*$needed " || fail "it requires $needed"
done

work=$(mktemp -d)
end() {
    umount -R -l "$work" 2>/dev/null || true
    rmdir "$work"
}
trap end EXIT
trap 'exit 1' INT TERM
mount -t tmpfs -o mode=755 dist-test-rpm "$work"
root=$work/root
mkdir "$root" "$work/upper" "$work/over"
mount -t overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/over" dist-test-rpm "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=755 run "$root/run"
in_root() { timeout 60 chroot "$root" "$@"; }

rpm --root "$root" --initdb
rpm --root "$root" --install --nodeps "$rpm" 2>"$work/said" || { cat "$work/said" >&2; fail "rpm --install"; }
rpm --root "$root" --verify --nodeps mirrorfs || fail "rpm --verify"
echo "rpm: $(in_root mirrorfs --version), $(rpm --root "$root" --query --list mirrorfs | wc -l) files"

mkdir "$root/run/src" "$root/run/dst"
cp -a "$root/usr/share/doc/mirrorfs" "$root/run/src/doc"
in_root mount -t mirrorfs /run/src /run/dst
in_root grep -q migrat /run/dst/doc/README.md || fail "the mount shows another README"
in_root mirrorfs wait /run/dst
in_root mirrorfs finish /run/dst
in_root mirrorfs verify /run/src /run/dst

rpm --root "$root" --erase --nodeps mirrorfs 2>"$work/said" || { cat "$work/said" >&2; fail "rpm --erase"; }
left=$(find "$work/upper" -name '*mirrorfs*' ! -path '*/rpm/*')
[ -z "$left" ] || fail "left behind: $left"
echo "dist-test-rpm: installed, migrated, verified, erased"
