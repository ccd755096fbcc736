#!/bin/bash
# deps.sh [COMMAND...]: installs the packages that the build needs. On Debian, as root, the script
# installs missing packages with apt; elsewhere the script names them. COMMANDs are further
# requirements (the Debian package has the same name).
. "$(dirname "$0")/lib.sh"

missing=()
# containerd's API imports Google's well-known types. Debian's protoc only recommends their package,
# so a protoc may lack the types.
well_known_types() {
  local folder code=0
  folder=$(mktemp -d)
  echo 'syntax = "proto3"; import "google/protobuf/any.proto";' > "$folder/probe.proto"
  protoc --proto_path="$folder" --descriptor_set_out=/dev/null "$folder/probe.proto" 2> /dev/null || code=$?
  rm -r "$folder"
  return $code
}
have protoc || missing+=(protobuf-compiler)
well_known_types || missing+=(libprotobuf-dev)
have cc || missing+=(gcc)
# -print-file-name prints a bare name for a missing file. The static binary needs libc.a.
[[ $(cc -print-file-name=libc.a 2> /dev/null) == /* ]] || missing+=(libc6-dev)
have make || missing+=(make)
have git || missing+=(git)
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates) # for the image
for command; do have "$command" || missing+=("$command"); done

if [ ${#missing[@]} != 0 ]; then
  by_hand="install these packages (Debian's names): ${missing[*]}"
  have apt-get || die "$by_hand"
  [ "$(id -u)" = 0 ] || die "$by_hand (as root: apt-get install ${missing[*]})"
  export DEBIAN_FRONTEND=noninteractive
  say "deps: apt-get install ${missing[*]}"
  apt-get update -q > /dev/null || say "deps: apt-get update failed; apt-get install uses the present lists"
  apt-get install -y -q -o DPkg::Lock::Timeout=120 --no-install-recommends "${missing[@]}" > /dev/null ||
    die "apt-get install failed; $by_hand"
fi

wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
have cargo || die "cargo is missing: install Rust $wanted or later with rustup (Debian packages an older one)"
found=$(cargo --version | cut -d ' ' -f 2)
[ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" = "$wanted" ] ||
  die "cargo is $found, Rust $wanted or later is needed: rustup update stable"
say "deps: ok (cargo $found)"
