#!/bin/sh
# release.sh VERSION - from a clean main: everything is tested, the version and the changelog are set, the packages built and
# tested, and the commit is tagged vVERSION. Nothing is pushed: `git push origin main vVERSION` starts the release workflow.
set -eu
cd "$(dirname "$0")/.."
version=${1:?release.sh VERSION}
stop() { echo "release.sh: $*" >&2; exit 1; }
echo "$version" | grep -Eq '^[0-9]+\.[0-9]+\.[0-9]+$' || stop "$version: not a version such as 1.2.3"
[ "$(git branch --show-current)" = main ] || stop "not on main"
[ -z "$(git status --porcelain)" ] || stop "there are changes that are not committed"
git rev-parse -q --verify "refs/tags/v$version" >/dev/null && stop "v$version exists"
sed -n '/^## Unreleased/,/^## [^U]/p' CHANGELOG.md | grep -q '^- ' || stop "CHANGELOG.md: nothing below Unreleased"

sed -i "0,/^version = /s/^version = .*/version = \"$version\"/" Cargo.toml
sed -i "s/^## Unreleased/## Unreleased\n\n## $version - $(date -u +%F)/" CHANGELOG.md
cargo update --offline --package mirrorfs --precise "$version"
make test-all
scripts/dist.sh
scripts/dist-test.sh
git commit -qam "release: $version"
git tag -a "v$version" -m "mirrorfs $version"
echo "release.sh: v$version is committed and tagged; packages are in target/dist"
