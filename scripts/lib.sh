# shellcheck shell=bash
# What the scripts share. Sourced, not run; leaves the caller in the repository's root.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Tools and build results that are worth keeping, never anything of the tree.
# shellcheck disable=SC2034 # used by those who source this
CACHE=${LIGHTERMAN_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/lighterman}

say() { printf '%s\n' "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }
have() { command -v "$1" > /dev/null; }
package_version() { sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1; }
