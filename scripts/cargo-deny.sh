#!/bin/bash
# cargo-deny.sh: checks licenses, sources and bans of every crate (deny.toml), and advisories where
# their database can be fetched. Without a cargo-deny on the machine, the script builds one in the
# cache folder: 2 minutes, once.
. "$(dirname "$0")/lib.sh"

deny=$(command -v cargo-deny || echo "$CACHE/bin/cargo-deny")
if [ ! -x "$deny" ]; then
  say "cargo-deny.sh: building cargo-deny into $CACHE/bin ..."
  # A separate target folder, without this tree's RUSTFLAGS.
  env -u RUSTFLAGS CARGO_TARGET_DIR="$CACHE/cargo-deny-target" cargo install --quiet --locked --root "$CACHE" cargo-deny
  rm -rf "$CACHE/cargo-deny-target"
fi

"$deny" --all-features --locked check --hide-inclusion-graph bans licenses sources
if said=$("$deny" fetch db 2>&1); then
  "$deny" --all-features --locked check --disable-fetch advisories
else
  say "cargo-deny: SKIPPED advisories, their database cannot be fetched: $(grep -v '^ *$' <<< "$said" | tail -n 1)"
fi
