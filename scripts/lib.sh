# shellcheck shell=bash
# Common functions, for `source`. Changes the working directory to the repository's root.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The folder of tools and build results; contains no file of the tree.
# shellcheck disable=SC2034 # scripts that source this file use the variable
CACHE=${LIGHTERMAN_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/lighterman}

say() { printf '%s\n' "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }
have() { command -v "$1" > /dev/null; }
package_version() { sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1; }
