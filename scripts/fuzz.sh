#!/bin/bash
# fuzz.sh [SECONDS [TARGET...]]: runs each fuzz target for SECONDS (default: 60). The first inputs
# are the seeds in fuzz/corpus, and the inputs of earlier runs in the cache folder. The script names
# a failing input, which is in fuzz/artifacts. Without a cargo-fuzz on the machine, the script
# builds one in the cache folder: half a minute, once.
. "$(dirname "$0")/lib.sh"
seconds=${1:-60}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || die "SECONDS must be a positive number, not '$seconds'"
shift || true
targets=("$@")
[ $# -gt 0 ] || mapfile -t targets < <(ls fuzz/corpus)

PATH=$CACHE/bin:$PATH
if ! have cargo-fuzz; then
  say "fuzz.sh: building cargo-fuzz into $CACHE/bin ..."
  # A separate target folder, without this tree's RUSTFLAGS.
  env -u RUSTFLAGS CARGO_TARGET_DIR="$CACHE/cargo-fuzz-target" cargo install --quiet --locked --root "$CACHE" cargo-fuzz
  rm -rf "$CACHE/cargo-fuzz-target"
fi

# libFuzzer needs rustc's coverage flag, which a stable rustc accepts only with RUSTC_BOOTSTRAP. The
# address sanitizer would need the nightly standard library, and finds little where unsafe code is
# forbidden. Overflow checks and debug assertions are on.
export RUSTC_BOOTSTRAP=1
build=${CARGO_TARGET_DIR:-$PWD/target}/fuzz
fuzz() { local command=$1; shift; cargo fuzz "$command" --sanitizer none --target-dir "$build" --debug-assertions "$@"; }

fuzz build
for target in "${targets[@]}"; do
  found=$CACHE/fuzz-corpus/$target
  mkdir -p "$found"
  count() { find "$found" -type f | wc -l; }
  # Each run starts with all inputs, so their number must have a bound: cmin keeps a minimal set of
  # inputs with the same coverage.
  if [ "$(count)" -gt 5000 ]; then
    fuzz cmin "$target" "$found" > /dev/null 2>&1 || { rm -rf "$found"; mkdir -p "$found"; }
  fi
  say "fuzz.sh: $target for $seconds s, from $(count) inputs and the seeds"
  # 512 MiB is many times the allocation for the largest message. 16 KiB is beyond every limit but
  # the limits of whole manifests and snapshots, whose larger inputs only have more entries.
  log=$build/$target.log
  fuzz run "$target" "$found" "fuzz/corpus/$target" -- \
    -max_total_time="$seconds" -rss_limit_mb=512 -max_len=16384 -timeout=10 -verbosity=0 -print_final_stats=1 > "$log" 2>&1 ||
    { cat "$log" >&2; die "the target $target failed, see above; the input is in fuzz/artifacts/$target"; }
  sed -n 's/^stat::\(number_of_executed_units\|new_units_added\|peak_rss_mb\): */  \1 /p' "$log" >&2
done
say "fuzz.sh: no failing input for ${targets[*]}"
