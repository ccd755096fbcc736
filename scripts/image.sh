#!/bin/bash
# image.sh OUT.tar: makes the container image as an OCI image layout, without a container engine,
# from BIN=FILE        the static binary CA_BUNDLE=FILE  certificate authorities, for registries
# (default: the machine's) IMAGE_TAG=TAG   the tag (default: the package's version) Import it with
# `ctr --namespace k8s.io images import OUT.tar`, or push it with any tool that reads OCI layouts.
# The same input gives the same bytes (as long as gzip is the same).
. "$(dirname "$0")/lib.sh"
out=${1:?usage: image.sh OUT.tar}
bin=${BIN:?set BIN to the static binary}
ca=${CA_BUNDLE:-/etc/ssl/certs/ca-certificates.crt}
version=$(package_version)
tag=${IMAGE_TAG:-$version}
name=lighterman.dev/lighterman:$tag

[ -x "$bin" ] || die "the binary $bin is missing: run \`make build\`"
[ -r "$ca" ] || die "the certificate authorities in $ca cannot be read: install ca-certificates, or set CA_BUNDLE"
if have readelf && readelf -lW "$bin" | grep -q INTERP; then
  die "$bin needs a dynamic loader, and the image has none: run \`make build\` for a static binary"
fi
machine=$(od -An -tu2 -j18 -N2 "$bin" | tr -d ' ') # e_machine of the ELF header
case $machine in
  62) architecture=amd64 ;;
  183) architecture=arm64 ;;
  *) die "$bin is for ELF machine $machine; this script supports amd64 (62) and arm64 (183)" ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/root/etc/ssl/certs" "$work/layout/blobs/sha256"
cp -L "$bin" "$work/root/lighterman"
# Line tables serve profiles on the build machine. The tables take three quarters of the file, and
# every node has a copy of the image.
strip --strip-debug "$work/root/lighterman"
cp -L "$ca" "$work/root/etc/ssl/certs/ca-certificates.crt"
chmod -R u=rwX,go=rX "$work/root"
chmod 755 "$work/root/lighterman"

pack() { # pack FOLDER NAME...: writes a tar that depends only on names, modes and contents
  tar --create --format=ustar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --directory "$@"
}
digest_of() { sha256sum "$1" | cut -d ' ' -f 1; }
# add MEDIA-TYPE FILE: moves the file into the blobs and prints its descriptor, as the inside of a
# JSON object
add() {
  local digest
  digest=$(digest_of "$2")
  printf '"mediaType":"%s","digest":"sha256:%s","size":%d' "$1" "$digest" "$(stat -c %s "$2")"
  mv "$2" "$work/layout/blobs/sha256/$digest"
}

pack "$work/root" etc lighterman > "$work/layer.tar"
diff_id=sha256:$(digest_of "$work/layer.tar")
gzip --no-name -9 "$work/layer.tar"
layer=$(add application/vnd.oci.image.layer.v1.tar+gzip "$work/layer.tar.gz")

cat > "$work/config" << END
{"architecture":"$architecture","os":"linux","config":{"User":"0:0","Env":["PATH=/"],"Entrypoint":["/lighterman"],"Labels":{"org.opencontainers.image.title":"lighterman","org.opencontainers.image.version":"$version","org.opencontainers.image.licenses":"Apache-2.0"}},"rootfs":{"type":"layers","diff_ids":["$diff_id"]},"history":[{"created":"1970-01-01T00:00:00Z","created_by":"scripts/image.sh"}],"created":"1970-01-01T00:00:00Z"}
END
# `kubectl exec POD -- lighterman status` searches PATH for the program. Without PATH in the image,
# containerd sets a PATH that lacks /.
path=$(sed -nE 's/.*"PATH=([^"]*)".*/\1/p' "$work/config")
[ -n "$path" ] && [ -x "$work/root${path%/}/lighterman" ] || die "the image's PATH ($path) does not contain the program"
config=$(add application/vnd.oci.image.config.v1+json "$work/config")

cat > "$work/manifest" << END
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{$config},"layers":[{$layer}]}
END
manifest=$(add application/vnd.oci.image.manifest.v1+json "$work/manifest")

# containerd reads the image's name from its own annotation. Other tools read the annotation of the
# OCI specification, which contains the tag alone.
cat > "$work/layout/index.json" << END
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{$manifest,"platform":{"architecture":"$architecture","os":"linux"},"annotations":{"io.containerd.image.name":"$name","org.opencontainers.image.ref.name":"$tag"}}]}
END
echo '{"imageLayoutVersion":"1.0.0"}' > "$work/layout/oci-layout"

mkdir -p "$(dirname "$out")"
pack "$work/layout" blobs index.json oci-layout > "$out.new"
mv "$out.new" "$out"
say "image: $name ($architecture, $(stat -c %s "$out") bytes) in $out"
