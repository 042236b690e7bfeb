#!/bin/sh
# setup.sh [--only-build] [--pjdfstest] [--fsx] [--bench] [--shards] [--load] - what building and testing need, if it is missing.
# On Debian by apt, as root or through sudo; elsewhere it names what to install. Safe to run again.
set -eu

# program:package
build="cc:gcc cargo:-"
tests="mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs chattr:e2fsprogs
  getfattr:attr getfacl:acl git:git rsync:rsync setcap:libcap2-bin fusermount3:fuse3 python3:python3
  losetup:mount setpriv:util-linux systemd-analyze:systemd chromium:chromium chromedriver:chromium-driver"
programs="$build $tests"
tools=""
for arg in "$@"; do
    case $arg in
    --only-build) programs=$build ;;
    --pjdfstest) tools="$tools pjdfstest@0.2.2" ;;
    --fsx) tools="$tools fsx@0.3.2" ;;
    # The runner has to be of the version of the crate: see Cargo.toml.
    --bench) programs="$programs valgrind:valgrind python3:python3" tools="$tools gungraun-runner@0.20.0" ;;
    --load) programs="$programs fio:fio stress-ng:stress-ng" ;;
    --shards)
        programs="$programs slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge mpirun:openmpi-bin"
        programs="$programs pgrep:procps" ;;
    *)
        sed -n '2,3s/^# //p' "$0" >&2
        exit 2
        ;;
    esac
done

# mkfs and friends live in sbin, which is not in everybody's path.
PATH=$PATH:/usr/sbin:/sbin
[ -n "${HOME:-}" ] && PATH=$PATH:$HOME/.cargo/bin

packages=""
for pair in $programs; do
    program=${pair%%:*} package=${pair#*:}
    command -v "$program" >/dev/null 2>&1 && continue
    if [ "$package" = - ]; then
        echo "setup: no $program: install Rust 1.95 or newer, see https://rustup.rs" >&2
        exit 1
    fi
    case " $packages " in *" $package "*) ;; *) packages="$packages $package" ;; esac
done

if [ -n "$packages" ]; then
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "setup: please install what Debian calls:$packages" >&2
        exit 1
    fi
    sudo=""
    if [ "$(id -u)" != 0 ]; then
        if ! command -v sudo >/dev/null 2>&1; then
            echo "setup: as root: apt-get install$packages" >&2
            exit 1
        fi
        sudo="sudo"
    fi
    export DEBIAN_FRONTEND=noninteractive
    echo "setup: installing$packages"
    # shellcheck disable=SC2086  # a list of words
    $sudo apt-get install -y --no-install-recommends $packages >/dev/null 2>&1 || {
        $sudo apt-get update -q
        # shellcheck disable=SC2086
        $sudo apt-get install -y --no-install-recommends $packages
    }
fi

for tool in $tools; do
    name=${tool%@*}
    command -v "$name" >/dev/null 2>&1 || cargo install --locked "$tool"
done

# As root: the module that mounts need. Not having it is for the mount itself to report.
if [ "$(id -u)" = 0 ] && [ ! -e /dev/fuse ]; then
    modprobe fuse 2>/dev/null || true
fi
