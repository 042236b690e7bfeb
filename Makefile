# `make` lists the targets. `make demo` and `make test` are what README starts with.

CARGO ?= cargo
PREFIX ?= /usr/local
DESTDIR ?=
# The binary that cargo was told to build (CARGO_TARGET_DIR moves it).
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
BIN := $(TARGET_DIR)/release/mirrorfs

.DEFAULT_GOAL := help
.PHONY: help setup build demo check test test-all loom asan fuzz bench bench-regress bench-baseline doc install dist dist-test clean \
        pjdfstest fsx crash powercut nasty shards load coverage

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install the Debian packages that build and tests need, if they are missing
	scripts/setup.sh

build: ## build the release binary
	$(CARGO) build --release --locked

demo: ## migrate a real tree of 20,000 files through the mount, and verify it
	scripts/setup.sh --only-build
	scripts/demo.sh

check: ## format, lints, dependencies
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets --all-features -- -D warnings
	@# Advisories need the network: the workflow asks for those.
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
	  $(CARGO) deny --log-level error check bans licenses sources; \
	else echo "skipped: cargo deny check (cargo install cargo-deny)"; fi

test: setup check ## check, then every test that this machine can run (as root: on real mounts)
	$(CARGO) test --locked --features fault --lib
	$(CARGO) test --locked --features fault --test it
	$(CARGO) test --locked --features fault --test loom

test-all: ## as test, and a test that cannot run here is a failure
	MIRRORFS_TEST_ALL=1 $(MAKE) test

loom: ## queue, bells, gates and populates in every order of threads (MIRRORFS_TEST_ALL=1: in more)
	$(CARGO) test --locked --test loom

# A tree of its own: with other flags everything would be built anew each time.
asan: ## the ring's tests under AddressSanitizer (needs a nightly toolchain)
	RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=$(TARGET_DIR)/asan $(CARGO) +nightly test --locked \
	  --target x86_64-unknown-linux-gnu --lib engine::ring

FUZZ_SECONDS ?= 60
fuzz: ## feed everything that is parsed with random bytes, FUZZ_SECONDS each (needs a nightly toolchain)
	$(CARGO) fuzz --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-fuzz
	for target in $$($(CARGO) fuzz list --fuzz-dir tests/fuzz); do \
	  $(CARGO) +nightly fuzz run --fuzz-dir tests/fuzz --target-dir $(abspath $(TARGET_DIR))/fuzz $$target -- \
	    -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -print_final_stats=1 || exit 1; done

# Not instructions: it needs valgrind, and fails where that is not installed.
bench: ## measure engine, populate, hydrate, metadata on MIRRORFS_BENCH_DIR; names the scripts that measure whole copies
	$(CARGO) bench --locked --bench copy --bench data --bench populate --bench hydrate --bench metadata
	@sed -sn '2s|^# \([a-z-]*[.]sh .*\)|also: scripts/bench/\1|p' scripts/bench/*.sh

bench-regress: ## count instructions; over 3 % more than benches/baseline.json is a failure (as root; BASE=COMMIT)
	scripts/setup.sh --bench
	scripts/bench/instructions.sh

bench-baseline: ## count instructions and write benches/baseline.json anew
	scripts/setup.sh --bench
	scripts/bench/instructions.sh --baseline

doc: ## build the API documentation
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items

install: build ## install binary, mount helper, unit, man pages, completions and documents below PREFIX
	MIRRORFS=$(abspath $(BIN)) scripts/install.sh "$(DESTDIR)" "$(PREFIX)"

dist: ## build .deb, .rpm and a static tarball in target/dist (needs cargo-deb, cargo-generate-rpm; installs them)
	scripts/dist.sh

dist-test: ## install the .deb on this machine, migrate a tree with it, take it off again (as root, Debian)
	scripts/dist-test.sh

clean: ## remove what was built
	$(CARGO) clean

pjdfstest: build ## POSIX conformance of the mount (as root)
	scripts/setup.sh --pjdfstest
	MIRRORFS=$(abspath $(BIN)) scripts/pjdfstest.sh
	MIRRORFS=$(abspath $(BIN)) PENDING=1 scripts/pjdfstest.sh

fsx: build ## 100,000 random operations on a file that starts pending, on each file system
	scripts/setup.sh --fsx
	MIRRORFS=$(abspath $(BIN)) scripts/fsx.sh

crash: build ## 100 kill -9 at random moments under a random workload (as root)
	MIRRORFS=$(abspath $(BIN)) python3 scripts/crash/kill9.py --rounds 100

nasty: build ## a tree with every awkward thing through mount and sync, on ext4, xfs, btrfs (as root)
	MIRRORFS=$(abspath $(BIN)) scripts/nasty.sh

shards: build ## sync --shard under a Slurm of four nodes and Open MPI, one killed (as root; installs slurm, openmpi)
	scripts/setup.sh --shards
	MIRRORFS=$(abspath $(BIN)) scripts/shards/slurm.sh

POWERCUT_STATES ?= 1000
powercut: build ## power cuts on ext4, ext4 data=writeback, xfs, btrfs: 1,000 states each, of migrations, of large files that are changed early, under programs, of sync (as root; hours)
	for what in mount mix mixed pending adopt huge sync; do \
	  MIRRORFS=$(abspath $(BIN)) WHAT=$$what scripts/crash/powercut.sh $(POWERCUT_STATES) || exit 1; done

LOAD_SECONDS ?= 300
load: build ## many processes at work on a tree that is being pulled, on each file system and transport (as root; installs fio, stress-ng)
	scripts/setup.sh --load
	MIRRORFS=$(abspath $(BIN)) python3 scripts/load.py --seconds $(LOAD_SECONDS)

coverage: setup ## lines that the tests run, in the daemons too (as root)
	scripts/coverage.sh
