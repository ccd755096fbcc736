#!/bin/bash
# mkimage.sh OUT.tar NAME:TAG [OPTION]...: writes an image as an OCI layout in a tar, for
# `ctr images import` and `ctl.sh push`. Prints the result as JSON: name, target (the digest that
# the name resolves to), manifest, index (or null), config, layers.
#   --file HOST:DEST      a file of this machine, with its mode; all files and links share a layer
#   --link DEST:TARGET    a symbolic link
#   --random MIB          another layer of that many MiB that do not compress; may be repeated
#   --seed TEXT           derive the random layers from TEXT; without this option, each is new
#   --gzip                gzip the layers
#   --entrypoint A,B      --env K=V...      --user U      --label K=V...
#   --multiarch           an index of this image for amd64 and an image of one small layer for arm64
#   --absent              as --multiarch, without the content of arm64, as in a node's store after a
#                         pull (for import only: no registry accepts this)
# Give NAME in full (docker.io/library/x:1): containerd looks up the exact string.
set -euo pipefail
umask 022
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
out=$1 name=$2
shift 2
files=() links=() random=() env='["PATH=/usr/bin:/bin"]' labels='{}' entrypoint='' user='' seed='' gzip='' multiarch='' absent=''
while [ $# -gt 0 ]; do
  case $1 in
    --gzip) gzip=+gzip; shift; continue ;;
    --multiarch) multiarch=1; shift; continue ;;
    --absent) multiarch=1 absent=1; shift; continue ;;
  esac
  [ $# -ge 2 ] || usage
  case $1 in
    --file) files+=("$2") ;;
    --link) links+=("$2") ;;
    --random) random+=("$2") ;;
    --seed) seed=$2 ;;
    --entrypoint) entrypoint=$2 ;;
    --env) env=$(jq -c --arg e "$2" '. + [$e]' <<< "$env") ;;
    --label) labels=$(jq -c --arg k "${2%%=*}" --arg v "${2#*=}" '. + {($k): $v}' <<< "$labels") ;;
    --user) user=$2 ;;
    *) usage ;;
  esac
  shift 2
done

work=$(mktemp -d "$(realpath -m "$out").XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/oci/blobs/sha256"
oci=application/vnd.oci.image
sha() { sha256sum "$1" | cut -d' ' -f1; }
# blob FILE MEDIATYPE: moves FILE into the layout and prints the descriptor
blob() {
  local digest size
  digest=$(sha "$1") size=$(stat -c %s "$1")
  mv "$1" "$work/oci/blobs/sha256/$digest"
  printf '{"mediaType":"%s","digest":"sha256:%s","size":%d}\n' "$2" "$digest" "$size"
}
# layer FOLDER: adds the folder's contents to `layers` and `diffs`. Equal contents give equal bytes
layer() {
  tar --create --file "$work/layer" --directory "$1" --format=ustar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner .
  diffs+=("sha256:$(sha "$work/layer")")
  if [ -n "$gzip" ]; then gzip -1 -n "$work/layer"; mv "$work/layer.gz" "$work/layer"; fi
  layers+=("$(blob "$work/layer" "$oci.layer.v1.tar$gzip")")
  rm -rf "$1"
}
# manifest ARCH: makes a manifest of the collected layers, with its descriptor in `manifest`
manifest() {
  jq -nc --arg arch "$1" --arg entrypoint "$entrypoint" --argjson env "$env" --arg user "$user" --argjson labels "$labels" \
    '{architecture: $arch, os: "linux", rootfs: {type: "layers", diff_ids: $ARGS.positional},
      config: ({Env: $env} + (if $entrypoint != "" then {Entrypoint: ($entrypoint / ",")} else {} end)
        + (if $user != "" then {User: $user} else {} end) + (if $labels != {} then {Labels: $labels} else {} end))}' \
    --args "${diffs[@]}" > "$work/config"
  config=$(blob "$work/config" "$oci.config.v1+json")
  jq -nc --arg oci "$oci" --argjson config "$config" \
    '{schemaVersion: 2, mediaType: ($oci + ".manifest.v1+json"), config: $config, layers: [$ARGS.positional[] | fromjson]}' \
    --args "${layers[@]}" > "$work/manifest"
  manifest=$(blob "$work/manifest" "$oci.manifest.v1+json" | jq -c --arg arch "$1" '. + {platform: {architecture: $arch, os: "linux"}}')
}

layers=() diffs=()
if [ $((${#files[@]} + ${#links[@]} + ${#random[@]})) = 0 ]; then mkdir "$work/root"; layer "$work/root"; fi
if [ $((${#files[@]} + ${#links[@]})) -gt 0 ]; then
  for f in "${files[@]}"; do
    mkdir -p "$(dirname "$work/root/${f#*:}")"
    cp -L --preserve=mode "${f%%:*}" "$work/root/${f#*:}"
  done
  for l in "${links[@]}"; do
    mkdir -p "$(dirname "$work/root/${l%%:*}")"
    ln -s "${l#*:}" "$work/root/${l%%:*}"
  done
  layer "$work/root"
fi
n=0
for mib in "${random[@]}"; do
  n=$((n + 1))
  key=$(if [ -n "$seed" ]; then printf '%s/%d' "$seed" "$n"; else head -c 32 /dev/urandom; fi | sha256sum | head -c 32)
  mkdir -p "$work/root/data"
  head -c "${mib}M" /dev/zero | openssl enc -aes-128-ctr -K "$key" -iv 00000000000000000000000000000000 > "$work/root/data/random-$n"
  layer "$work/root"
done
manifest amd64
target=$manifest index=null
made_config=$config made_manifest=$manifest made_layers=("${layers[@]}")
if [ -n "$multiarch" ]; then
  layers=() diffs=()
  mkdir -p "$work/root"
  echo "$name for another machine" > "$work/root/not-for-you"
  layer "$work/root"
  manifest arm64
  jq -nc --arg oci "$oci" '{schemaVersion: 2, mediaType: ($oci + ".index.v1+json"), manifests: [$ARGS.positional[] | fromjson]}' \
    --args "$made_manifest" "$manifest" > "$work/index"
  target=$(blob "$work/index" "$oci.index.v1+json")
  index=$target
  if [ -n "$absent" ]; then
    for d in "$manifest" "$config" "${layers[@]}"; do rm "$work/oci/blobs/sha256/$(jq -r '.digest | ltrimstr("sha256:")' <<< "$d")"; done
  fi
fi

printf '{"imageLayoutVersion":"1.0.0"}' > "$work/oci/oci-layout"
jq -nc --arg oci "$oci" --argjson target "$target" --arg name "$name" \
  '{schemaVersion: 2, mediaType: ($oci + ".index.v1+json"), manifests: [$target + {annotations: {
    "io.containerd.image.name": $name, "org.opencontainers.image.ref.name": ($name | split(":") | last)}}]}' > "$work/oci/index.json"
tar --create --file "$work/out" --directory "$work/oci" --format=ustar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner oci-layout index.json blobs
mv "$work/out" "$out"
jq -nc --arg name "$name" --argjson target "$target" --argjson index "$index" --argjson manifest "$made_manifest" --argjson config "$made_config" \
  '{name: $name, target: $target.digest, index: ($index | if . then .digest else null end), manifest: $manifest.digest,
    config: $config.digest, layers: [$ARGS.positional[] | fromjson | {digest, size}]}' --args "${made_layers[@]}"
