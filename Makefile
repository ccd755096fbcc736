# What can be done with this tree: `make help`. CARGO_TARGET_DIR is honoured; LIGHTERMAN_CACHE (default: the user's cache folder)
# keeps tools and the test bed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Prerequisites are steps in order, and cargo uses all cores by itself.
.NOTPARALLEL:

TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))
TRIPLE := $(shell rustc -vV 2> /dev/null | sed -n 's/^host: //p')
CACHE := $(or $(LIGHTERMAN_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lighterman)

# The static binary, which needs no base image.
BIN ?= $(TARGET_DIR)/$(TRIPLE)/release/lighterman
# The container image as a tar file.
IMAGE ?= $(TARGET_DIR)/lighterman-image.tar
# Further commands for `make deps` to see to, as CI wants them.
DEPS ?=
# Arguments of `make demo`, as in: make demo ARGS='--nodes 5 --image-size 1GiB'
ARGS ?=
# How long `make fuzz` runs each target.
SECONDS_EACH ?= 60
# Test binaries that need neither root nor components nor the static binary.
FAST_TESTS ?= --lib --bins --test fast --test simulation
# Commands that print `figure NAME VALUE`, one argument each.
FIGURE_SOURCES ?= 'cargo bench --locked --bench transfer' \
  'cargo bench --locked --no-default-features --features testing --bench pure' \
  'cargo test --locked --test components mesh:: -- --nocapture' \
  'cargo test --locked --test e2e' \
  'cargo test --locked --release --no-default-features --features testing --test simulation -- --nocapture'

# Where tests and measurements find what was built.
BUILT = LIGHTERMAN_BIN='$(BIN)' LIGHTERMAN_IMAGE='$(IMAGE)' LIGHTERMAN_TESTBED='$(CACHE)/testbed' \
  LIGHTERMAN_PREVIOUS='$(CACHE)/previous/$(file < tests/e2e/previous-commit)'

.PHONY: help
help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | column -t -s '|'

.PHONY: deps
deps: ## install or name what the build needs
	@scripts/deps.sh $(DEPS)

.PHONY: build
build: ## the static release binary
	RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --locked --bin lighterman --target $(TRIPLE)
	@ls -l '$(BIN)'

.PHONY: demo
demo: deps build ## agents on this machine, one image, a registry that is down (ARGS=...)
	@# The agents' own log would stand between the lines of the story.
	LIGHTERMAN_LOG="$${LIGHTERMAN_LOG:-warn}" '$(BIN)' demo $(ARGS)

.PHONY: image
image: ## the container image, from the static binary
	@[ -x '$(BIN)' ] || $(MAKE) --no-print-directory build
	@BIN='$(BIN)' scripts/image.sh '$(IMAGE)'

.PHONY: manifest
manifest: ## render the chart into manifests/lighterman.yaml
	@scripts/render-manifest.sh

.PHONY: check-manifest
check-manifest: ## manifests/lighterman.yaml is what the chart renders
	@scripts/render-manifest.sh --check

.PHONY: check-flags
check-flags: ## chart values, variables and flags are the same
	@scripts/check-flags.sh

.PHONY: check-scripts
check-scripts:
	@if command -v shellcheck > /dev/null; then \
	  shellcheck --external-sources --source-path=SCRIPTDIR --severity=warning scripts/*.sh .ci/run && echo 'check-scripts: ok' >&2; \
	else \
	  echo 'check-scripts: SKIPPED, shellcheck is not installed' >&2; \
	fi

.PHONY: lint
lint: check-scripts check-flags check-manifest ## everything that is checked without running the program
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --no-default-features --lib -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps
	scripts/cargo-deny.sh

.PHONY: testbed
testbed: ## Kubernetes and containerds for the tests, into the cache folder (a quarter of an hour, once)
	tests/testbed/setup.sh

.PHONY: previous
previous: ## the agent of an earlier commit, into the cache folder, to run beside this tree's (once for each commit)
	@LIGHTERMAN_CACHE='$(CACHE)' scripts/previous.sh

.PHONY: test-fast
test-fast: ## the tests that need nothing
	cargo test --locked $(FAST_TESTS)

.PHONY: fuzz
fuzz: ## each fuzz target for a while (SECONDS_EACH=60)
	scripts/fuzz.sh '$(SECONDS_EACH)'

.PHONY: need-root
need-root:
	@[ "$$(id -u)" = 0 ] || { echo 'make test needs root, for network namespaces and containerds of its own; make test-fast does not' >&2; exit 1; }

.PHONY: test
test: need-root deps testbed previous build image ## all tests, on real components
	@scripts/check-flags.sh '$(BIN)'
	$(BUILT) cargo test --locked

.PHONY: figures
figures: need-root deps testbed build image ## measure, into target/figures.txt
	@$(BUILT) scripts/figures.sh '$(TARGET_DIR)/figures.txt' $(FIGURE_SOURCES)

.PHONY: clean
clean: ## remove what was built; the cache folder stays
	cargo clean
	rm -f '$(IMAGE)'
