#!/bin/bash
# previous.sh [COMMIT]: builds the agent of an earlier commit, which a test runs beside the agent of
# this tree. COMMIT is 40 hexadecimal digits; the default is in tests/e2e/previous-commit. The cache
# folder then has previous/COMMIT/image.tar, with the tag `previous`, and
# previous/COMMIT/lighterman.yaml, the manifest of that commit. A later run finds both and builds
# nothing. A repository without the commit (a shallow clone) is no failure: the script builds
# nothing, and the test counts as ignored.
. "$(dirname "$0")/lib.sh"
commit=${1:-$(cat tests/e2e/previous-commit)}
[[ $commit =~ ^[0-9a-f]{40}$ ]] || die "COMMIT must be 40 hexadecimal digits, not '$commit'"
home=$CACHE/previous
folder=$home/$commit
mkdir -p "$home"
# The lock keeps two runs from building in the same folders.
exec 9> "$home/lock"
flock 9

is_built() { [ -f "$folder/image.tar" ] && [ -f "$folder/lighterman.yaml" ]; }
if is_built; then
  say "previous.sh: $folder is built already"
  exit
fi
if ! git cat-file -e "$commit^{commit}" 2> /dev/null; then
  say "previous.sh: SKIPPED, this repository has no commit $commit; a shallow clone gets the commit by \`git fetch --unshallow\`"
  exit
fi

say "previous.sh: building $commit, once ..."
source=$home/source target=$home/target
rm -rf "$source"
mkdir -p "$source" "$folder"
git archive "$commit" | tar --extract --directory "$source"
triple=$(rustc -vV | sed -n 's/^host: //p')
# No optimization and no debug information: half the time of a release build. The binary is static,
# because the image has no loader.
(cd "$source" && RUSTFLAGS='-C target-feature=+crt-static' CARGO_TARGET_DIR=$target CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=0 \
  cargo build --quiet --locked --bin lighterman --target "$triple")
BIN=$target/$triple/debug/lighterman IMAGE_TAG=previous scripts/image.sh "$folder/image.tar"
cp "$source/manifests/lighterman.yaml" "$folder/lighterman.yaml"
# The next pinned commit usually has other dependencies, and the folder has more than a GiB.
rm -rf "$source" "$target"
