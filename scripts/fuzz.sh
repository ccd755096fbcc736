#!/bin/bash
# fuzz.sh [SECONDS [TARGET...]]: runs each fuzz target for that long (default: 60 s), from the seeds in fuzz/corpus and from what earlier
# runs found, which is kept in the cache folder. An input that fails is left in fuzz/artifacts, and named.
# cargo-fuzz is built into the cache folder when the machine has none: half a minute, once.
. "$(dirname "$0")/lib.sh"
seconds=${1:-60}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || die "how many seconds? not '$seconds'"
shift || true
targets=("$@")
[ $# -gt 0 ] || mapfile -t targets < <(ls fuzz/corpus)

PATH=$CACHE/bin:$PATH
if ! have cargo-fuzz; then
  say "fuzz.sh: building cargo-fuzz into $CACHE/bin ..."
  # In a target folder of its own: the flags of this build are not meant for it.
  env -u RUSTFLAGS CARGO_TARGET_DIR="$CACHE/cargo-fuzz-target" cargo install --quiet --locked --root "$CACHE" cargo-fuzz
  rm -rf "$CACHE/cargo-fuzz-target"
fi

# The coverage that guides libFuzzer is a flag of rustc that stable offers on request only. The address sanitizer would need the
# nightly standard library, and finds little where unsafe code is forbidden; overflow checks and debug assertions are on.
export RUSTC_BOOTSTRAP=1
build=${CARGO_TARGET_DIR:-$PWD/target}/fuzz
fuzz() { local command=$1; shift; cargo fuzz "$command" --sanitizer none --target-dir "$build" --debug-assertions "$@"; }

fuzz build
for target in "${targets[@]}"; do
  found=$CACHE/fuzz-corpus/$target
  mkdir -p "$found"
  count() { find "$found" -type f | wc -l; }
  # Every run tries all of them first, so that they must not become ever more: of many, those that reach something of their own stay.
  if [ "$(count)" -gt 5000 ]; then
    fuzz cmin "$target" "$found" > /dev/null 2>&1 || { rm -rf "$found"; mkdir -p "$found"; }
  fi
  say "fuzz.sh: $target for $seconds s, from $(count) inputs and the seeds"
  # 512 MiB: many times what the largest message may make an agent allocate. 16 KiB is beyond every limit but those of whole
  # manifests and snapshots, which differ in their count of entries only.
  log=$build/$target.log
  fuzz run "$target" "$found" "fuzz/corpus/$target" -- \
    -max_total_time="$seconds" -rss_limit_mb=512 -max_len=16384 -timeout=10 -verbosity=0 -print_final_stats=1 > "$log" 2>&1 ||
    { cat "$log" >&2; die "$target: see above; the input is in fuzz/artifacts/$target"; }
  sed -n 's/^stat::\(number_of_executed_units\|new_units_added\|peak_rss_mb\): */  \1 /p' "$log" >&2
done
say "fuzz.sh: nothing found in ${targets[*]}"
