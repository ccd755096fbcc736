# `make help` lists the targets. CARGO_TARGET_DIR is honored. LIGHTERMAN_CACHE (default: the user's
# cache folder) contains tools and the test bed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Prerequisites run in order, and cargo uses all cores.
.NOTPARALLEL:

TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))
TRIPLE := $(shell rustc -vV 2> /dev/null | sed -n 's/^host: //p')
CACHE := $(or $(LIGHTERMAN_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lighterman)

# The static binary, for an image without a base image.
BIN ?= $(TARGET_DIR)/$(TRIPLE)/release/lighterman
# The container image as a tar file.
IMAGE ?= $(TARGET_DIR)/lighterman-image.tar
# Further commands that `make deps` installs, for CI.
DEPS ?=
# Arguments of `make demo`, for example: make demo ARGS='--nodes 5 --image-size 1GiB'
ARGS ?=
# Seconds for which `make fuzz` runs each target.
SECONDS_EACH ?= 60
# Test binaries that need neither root nor components nor the static binary.
FAST_TESTS ?= --lib --bins --test fast --test simulation
# Commands that print `figure NAME VALUE`, one argument each.
FIGURE_SOURCES ?= 'cargo bench --locked --bench transfer' \
  'cargo bench --locked --no-default-features --features testing --bench pure' \
  'cargo test --locked --test components mesh:: -- --nocapture' \
  'cargo test --locked --test e2e' \
  'cargo test --locked --release --no-default-features --features testing --test simulation -- --nocapture'

# The paths of built files, for tests and measurements.
BUILT = LIGHTERMAN_BIN='$(BIN)' LIGHTERMAN_IMAGE='$(IMAGE)' LIGHTERMAN_TESTBED='$(CACHE)/testbed' \
  LIGHTERMAN_PREVIOUS='$(CACHE)/previous/$(file < tests/e2e/previous-commit)'

.PHONY: help
help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | column -t -s '|'

.PHONY: deps
deps: ## install the packages that the build needs, or name them
	@scripts/deps.sh $(DEPS)

.PHONY: build
build: ## build the static release binary
	RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --locked --no-default-features --features agent --bin lighterman --target $(TRIPLE)
	@ls -l '$(BIN)'

.PHONY: demo
demo: deps build ## recover an image between agents on this machine, with a registry that is down (ARGS=...)
	@# The level warn keeps the agents' log out of the demo's output.
	LIGHTERMAN_LOG="$${LIGHTERMAN_LOG:-warn}" '$(BIN)' demo $(ARGS)

.PHONY: image
image: ## build the container image from the static binary
	@[ -x '$(BIN)' ] || $(MAKE) --no-print-directory build
	@BIN='$(BIN)' scripts/image.sh '$(IMAGE)'

.PHONY: manifest
manifest: ## render the chart into manifests/lighterman.yaml
	@scripts/render-manifest.sh

.PHONY: check-manifest
check-manifest: ## check that manifests/lighterman.yaml is the rendered chart
	@scripts/render-manifest.sh --check

.PHONY: check-flags
check-flags: ## check that chart values, variables and flags agree
	@scripts/check-flags.sh

.PHONY: check-scripts
check-scripts:
	@if command -v shellcheck > /dev/null; then \
	  shellcheck --external-sources --source-path=SCRIPTDIR --severity=warning scripts/*.sh .ci/run && echo 'check-scripts: ok' >&2; \
	else \
	  echo 'check-scripts: SKIPPED, shellcheck is not installed' >&2; \
	fi

.PHONY: code-lines
code-lines: ## print the lines of production code, by capability
	cargo test --locked --quiet --test fast -- --nocapture every_module_belongs_to_a_capability

.PHONY: metrics-page
metrics-page: ## write docs/metrics.md from the metrics of the code
	LIGHTERMAN_WRITE_METRICS_PAGE=1 cargo test --locked --quiet --test fast -- the_metrics_page_lists_every_metric

.PHONY: prose
prose: ## the figures of the prose, and every sentence that counts against a limit
	cargo test --locked --quiet --test fast -- --nocapture prose_names_its_things

.PHONY: lint
lint: check-scripts check-flags check-manifest ## run all checks that do not run the program
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --no-default-features --lib -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps
	cargo test --locked --quiet --test fast -- prose_names_its_things
	scripts/cargo-deny.sh

.PHONY: testbed
testbed: ## build Kubernetes and containerd versions for the tests in the cache folder (15 minutes, once)
	tests/testbed/setup.sh

.PHONY: previous
previous: ## build the agent of an earlier commit in the cache folder, to run beside this tree's agent (once for each commit)
	@LIGHTERMAN_CACHE='$(CACHE)' scripts/previous.sh

.PHONY: test-fast
test-fast: ## run the tests that need neither root nor components
	cargo test --locked $(FAST_TESTS)

.PHONY: fuzz
fuzz: ## run each fuzz target (SECONDS_EACH=60)
	scripts/fuzz.sh '$(SECONDS_EACH)'

.PHONY: need-root
need-root:
	@[ "$$(id -u)" = 0 ] || { echo 'make test needs root, for its own network namespaces and containerds; make test-fast does not' >&2; exit 1; }

.PHONY: test
test: need-root deps testbed previous build image ## run all tests, on real components
	@scripts/check-flags.sh '$(BIN)'
	$(BUILT) cargo test --locked

.PHONY: figures
figures: need-root deps testbed build image ## measure, and write target/figures.txt
	@$(BUILT) scripts/figures.sh '$(TARGET_DIR)/figures.txt' $(FIGURE_SOURCES)

.PHONY: clean
clean: ## remove built files; the cache folder stays
	cargo clean
	rm -f '$(IMAGE)'
