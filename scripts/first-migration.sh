#!/bin/bash
# first-migration.sh - a first migration by the installed program and the README's commands alone; prints the transcript of docs/FIRST-MIGRATION.md.
# As root. DEB: the package (target/dist/*.deb). Everything happens in a mount namespace of its own: the package is unpacked beside the system,
# /srv/old is a new ext4, /srv/new a new xfs.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${FIRST_INSIDE:-}" ]; then
    DEB=${DEB:-$(ls "$PWD"/target/dist/*.deb)} exec env FIRST_INSIDE=1 unshare --mount --propagation private "$0"
fi
work=$(mktemp -d)
end() {
    for at in /srv/new /srv/old; do umount -l "$at" 2>/dev/null || true; done
    umount -l /run/mirrorfs /srv /usr/bin /usr/sbin 2>/dev/null || true
    rm -rf "$work"
}
trap end EXIT
trap 'exit 1' INT TERM
{
    mkdir -p "$work/root/var/lib/dpkg" "$work/srv" /run/mirrorfs
    touch "$work/root/var/lib/dpkg/status"
    dpkg --root="$work/root" --force-depends --log=/dev/null -i "$DEB"
    # What the package has in /usr/bin and /usr/sbin, over the system's.
    for dir in bin sbin; do
        mkdir -p "$work/$dir.upper" "$work/$dir.work"
        cp -a "$work/root/usr/$dir/." "$work/$dir.upper/"
        mount -t overlay -o "lowerdir=/usr/$dir,upperdir=$work/$dir.upper,workdir=$work/$dir.work" overlay "/usr/$dir" ||
            mount -t overlay -o "lowerdir=$work/root/usr/$dir:/usr/$dir" overlay "/usr/$dir"
    done
    mount --bind "$work/srv" /srv
    mount -t tmpfs tmpfs /run/mirrorfs
    mkdir /srv/old /srv/new
    truncate -s 3G "$work/old.img" "$work/new.img"
    mkfs.ext4 -q -F "$work/old.img"
    mkfs.xfs -q -f "$work/new.img"
    mount -o loop "$work/old.img" /srv/old
    mount -o loop "$work/new.img" /srv/new
    cp -a /usr/share/doc /usr/share/zoneinfo /usr/share/perl5 /srv/old/ 2>/dev/null || true
    sync
} >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
export LC_ALL=C.UTF-8
# What a shell would show.
try() {
    printf '$ %s\n' "$*"
    (eval "$*") 2>&1 || printf '(exit code %s)\n' $?
}
try mirrorfs --version
try df -h --output=target,fstype,used,size /srv/old /srv/new
printf '\n# 1. days ahead, while the old tree is in use\n'
try mirrorfs sync --stats /srv/old /srv/new
echo "written after the copy" >/srv/old/late
rm -r /srv/old/perl5
printf '\n# somebody has worked in it since; what would another pass do?\n'
try 'mirrorfs sync -n -i --delete /srv/old /srv/new | head -n 4'
printf '\n# 2. freeze: services are stopped, the old tree is read-only\n'
try mount -o remount,ro /srv/old
printf '\n# 3. mount: users are back after this line\n'
try 'time mirrorfs mount --adopt --delete /srv/old /srv/new'
try cat /srv/new/late
try 'echo "a user works" >/srv/new/mine'
printf '\n# 4. wait\n'
try mirrorfs wait /srv/new
try mirrorfs status /srv/new
printf '\n# 5. finish\n'
try mirrorfs finish /srv/new
try findmnt -no TARGET,FSTYPE /srv/new
try mirrorfs verify /srv/old /srv/new
printf '\n# the old tree can go\n'
try umount /srv/old
