# make run     a real guest booted straight and through prestaged, and a table of what that changed
# make bench-predict  recorded traces through the predictor and every peer, and what the figures say
# make bench-datapath  requests, latency and processor time beside other block servers
# make bench-callgrind  instructions and time that the predictor takes an access, instructions of a read that is in RAM
# make test    everything that must hold: format, lints, dependencies, unit, property and end-to-end tests
# make properties    the property tests with other seeds and PROPTEST_CASES cases each (500); make test has one seed
# make fuzz    hostile guests, NBD clients and files, ten minutes each (SECONDS=); make test gives each half a minute
# make torture    a million crashes of the SSD tier; a hundred random balloon schedules on a full guest, in which no program may be
#                 killed; a hundred kills of prestaged under full load, by a client in the test's own process and by a guest,
#                 and as many upgrades and upgrades with a kill in between; two hours
#
# They install what they need from the distribution (scripts/setup.sh) and can be repeated at no cost.
#   STORE=PATH|NBD-URI   make run: slow storage of your own in place of nbdkit with 5 ms a read
#   TRACES=DIR           make bench-predict: traces of your own in place of benches/traces
#   PRESTAGE_CACHE       where the guest image is kept, default ~/.cache/prestage

SHELL := bash
TARGET := $(or $(CARGO_TARGET_DIR),target)

# libvirtd's namespaces and the guest's files need root; cargo itself runs as the user
ifneq ($(shell id -u),0)
SUDO := sudo --preserve-env
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER := sudo --preserve-env
endif

.PHONY: help setup build image run bench-predict bench-datapath bench-callgrind instructions test properties fuzz torture check deny advisories

help:
	@sed -n '/^$$/q;s/^# \?//p' Makefile

setup:
	@scripts/setup.sh

# The programs, optimised, in target/release.
build: setup
	cargo build --locked --release --bins

# The Debian guest, built once.
image: setup
	@$(SUDO) scripts/guest-image.sh

run: build image
	@$(SUDO) $(TARGET)/release/bench boots --out target/run.json $(if $(STORE),--store '$(STORE)')

# Figures as JSON go below the build's folder, a curve a trace to docs/. Without Python the rest is measured.
bench-predict: setup
	@scripts/setup.sh predict || true
	cargo build --locked --release -p prestage-benches
	$(TARGET)/release/bench predict --libcachesim --json $(TARGET)/predict/run.json --svg docs \
	  $(if $(TRACES),--traces '$(TRACES)')

# Figures as JSON go to target/datapath.json. Wants two cores for itself, 4 GB of memory and 3 GB of disk.
bench-datapath: build
	$(TARGET)/release/bench datapath --json $(TARGET)/datapath.json

# The time of an access is measured on any host; without valgrind the target says so and fails. Nothing here needs root.
bench-callgrind:
	@scripts/setup.sh callgrind || true
	env -u CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER \
	  cargo bench --locked -p prestage-predictor --bench instructions
	$(HIT)

# A read that is in RAM takes as many instructions as are on record, or fewer. Of one package: of the workspace it would be
# built with all that models need.
HIT := env -u CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER cargo bench --locked -p prestage-integration --bench hit
instructions: setup
	@scripts/setup.sh callgrind || true
	@if command -v valgrind >/dev/null; then $(HIT); \
	else echo 'instructions: SKIPPED, no valgrind: what a read that is in RAM takes is not compared'; fi

check: setup
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

deny: setup
	@scripts/deny.sh

# Needs the network: the database of known vulnerabilities.
advisories:
	@scripts/deny.sh advisories

# SECONDS is the shell's own count of them unless it is given to make.
fuzz: setup
	scripts/fuzz.sh $(if $(filter command line environment,$(origin SECONDS)),$(SECONDS),600)

# One seed, so that a change is answered for what it changed; `make properties` goes on looking with others.
test: export PROPTEST_RNG_SEED ?= 20260922
# End-to-end tests find the programs beside themselves. The runner's summary stays the last thing on the screen.
test: check deny image instructions
	scripts/fuzz.sh 30
	cargo build --locked --workspace --bins --tests
	if cargo nextest --version >/dev/null 2>&1; then \
	  cargo nextest run --locked --workspace --no-fail-fast; \
	else \
	  cargo test --locked --workspace --no-fail-fast; \
	fi

# Every library's tests: which of them are properties only the sources tell.
properties: export PROPTEST_CASES ?= 500
properties: setup
	cargo nextest run --locked --workspace --lib --no-fail-fast

# Of the whole workspace: a part of it would be built with other features, and for ten minutes.
torture: image
	cargo build --locked --workspace --bins --tests
	PRESTAGE_CRASHES=1000000 PROPTEST_RNG_SEED=$$RANDOM$$RANDOM cargo test --locked --release -p prestage-cache --lib -- --nocapture a_crash_at_any
	PRESTAGE_ROUNDS=20 cargo test --locked --workspace --test crash -- --nocapture
	PRESTAGE_SCHEDULES=100 cargo test --locked --workspace --test demand -- --nocapture a_guest_filled
	PRESTAGE_ROUNDS=100 cargo test --locked --workspace --test crash_load --test crash_guest --test handover -- \
	  --nocapture --test-threads=1
