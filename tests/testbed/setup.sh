#!/bin/bash
# setup.sh: builds everything that the test bed runs, in the cache folder. Starts nothing. Takes 0 s
# if nothing has changed. Needs root, Debian bookworm or later, and access to the Debian archive and
# a Go module proxy by the machine's own settings.
#   LIGHTERMAN_CACHE=DIR               the parent of the cache folder
#                                      (default: $XDG_CACHE_HOME/lighterman)
#   LIGHTERMAN_CONTAINERD_EXTRA=2.0    build these containerds as well
# A part is built again when its function in this file or its go.sum has changed. A part without a
# function is removed.
. "$(dirname "$0")/lib.sh"
[ "$(id -u)" = 0 ] || die "run as root"
export DEBIAN_FRONTEND=noninteractive
WORK=$P/.work # parts are built here and renamed into place

# part NAME [FILE...]: runs make_NAME unless $P/NAME was made by the same function from the same
# FILEs. MADE is not empty if the part exists afterwards. An exit code would not do: bash ignores
# `set -e` in a function that is called as a condition.
part() {
  local name=$1 want t=$SECONDS code
  shift
  MADE=1
  want=$( (declare -f "make_$name"; [ $# = 0 ] || cat "$@") | sha256sum)
  if [ "$(cat "$P/.stamps/$name" 2> /dev/null)" = "$want" ] && [ -d "$P/$name" ]; then return; fi
  say "$name ..."
  rm -rf "${WORK:?}/$name" "$P/versions.txt"
  mkdir -p "$WORK/$name" "$P/.stamps"
  set +e
  ( set -e; cd "$WORK/$name"; "make_$name" ) > "$P/log/$name.log" 2>&1
  code=$?
  set -e
  if [ $code != 0 ]; then
    MADE=
    tail -n 15 "$P/log/$name.log" >&2
    say "$name FAILED; the whole log is $P/log/$name.log"
    return
  fi
  rm -rf "${P:?}/$name"
  mv "$WORK/$name" "$P/$name"
  echo "$want" > "$P/.stamps/$name"
  say "$name done in $((SECONDS - t)) s"
}
need() { part "$@"; [ -n "$MADE" ] || die "$1 is required. Remove the cause and run setup.sh again: finished parts are kept"; }

# ---- packages of the host
host_packages() {
  local pair need=()
  for pair in ip:iproute2 iptables:iptables nsenter:util-linux jq:jq curl:curl openssl:openssl gzip:gzip tar:tar find:findutils; do
    command -v "${pair%%:*}" > /dev/null || need+=("${pair#*:}")
  done
  [ -d /etc/ssl/certs ] && [ -n "$(ls /etc/ssl/certs)" ] || need+=(ca-certificates)
  [ ${#need[@]} = 0 ] && return 0
  say "apt-get install ${need[*]}"
  { apt-get update -q && apt-get install -y -q -o DPkg::Lock::Timeout=120 --no-install-recommends "${need[@]}"; } > "$P/log/host.log" 2>&1 ||
    { tail "$P/log/host.log" >&2; die "apt-get install ${need[*]} failed; see $P/log/host.log"; }
}

# ---- Debian packages of any suite, unpacked without being installed
# The archive's address and key are the machine's own; only the suite differs.
archive() {
  [ -n "${ARCHIVE:-}" ] && return 0
  ARCHIVE=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -1)
  if [ -z "$ARCHIVE" ]; then # apt has no lists yet
    apt-get update -q
    ARCHIVE=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -1)
  fi
  [ -n "$ARCHIVE" ] || { echo "apt knows no Debian archive: check /etc/apt/sources.list*" >&2; return 1; }
}
suite_apt() { # suite_apt SUITE APT-COMMAND ARGS...
  local s=$1 cmd=$2 kind
  shift 2
  archive
  mkdir -p "$WORK/apt/$s/partial"
  for kind in deb deb-src; do
    echo "$kind [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $ARCHIVE $s main"
  done > "$WORK/apt/$s.list"
  # A mirror may lag behind the validity period; the signature is still verified.
  local o=(-q -o Acquire::Check-Valid-Until=false -o "Dir::Etc::sourcelist=$WORK/apt/$s.list" -o Dir::Etc::sourceparts=- -o "Dir::State::Lists=$WORK/apt/$s"
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root -o Acquire::Retries=3)
  if [ ! -f "$WORK/apt/$s.updated" ]; then
    apt-get "${o[@]}" update
    touch "$WORK/apt/$s.updated"
  fi
  case $cmd in
    depends) apt-cache "${o[@]}" depends "$@" ;;
    *) apt-get "${o[@]}" "$cmd" "$@" ;;
  esac
}
unpack() { # unpack SUITE PACKAGE...: into ./root, one line each in ./versions
  local s=$1 p deb
  shift
  for p in "$@"; do
    suite_apt "$s" download "$p"
    for deb in "$p"_*.deb; do
      dpkg-deb -x "$deb" root
      dpkg-deb -f "$deb" Package Version | sed 's/.*: //' | paste -sd' ' >> versions
      rm "$deb"
    done
  done
}

containerd_of() { unpack "$1" containerd; mkdir bin; cp root/usr/bin/{containerd,containerd-shim-runc-v2,ctr} bin/; rm -r root; bin/containerd --version; }
make_containerd-1.7() { containerd_of trixie; }
# trixie's containerd runs on bookworm's libc. runc from trixie on does not, so bookworm's runc
# serves every containerd.
make_tools() {
  unpack bookworm runc containernetworking-plugins busybox-static
  unpack trixie etcd-server docker-registry prometheus
  mkdir bin
  cp root/usr/sbin/runc root/usr/bin/{etcd,docker-registry,prometheus} root/bin/busybox bin/
  mv root/usr/lib/cni cni
  rm -r root
  bin/runc --version; bin/etcd --version; bin/docker-registry --version; bin/prometheus --version
}

# ---- Go: the machine's, if it is recent or can download the required version; otherwise Debian's
# newest
CONTAINERD_GO=1.26.8 # the go.mod of containerd 2.3.7; those of the other versions ask for less
go_wanted() { { echo $CONTAINERD_GO; sed -n 's/^go //p' "$TESTBED"/*/go.mod; } | sort -V | tail -n 1; }
go_suits() { # go_suits COMMAND
  local dir v
  dir=$(mktemp -d)
  printf 'module testbed\n\ngo %s\n' "$(go_wanted)" > "$dir/go.mod"
  v=$(cd "$dir" && GOTOOLCHAIN=${GOTOOLCHAIN:-auto} GOFLAGS='' GOWORK=off "$1" version 2> /dev/null) || v=
  rm -r "$dir"
  version_at_least "$(awk '{ print substr($3, 3) }' <<< "$v")" "$(go_wanted)"
}
# goroot_from ROOT: makes ./goroot from Debian's unpacked Go packages, which consist of two folders
# joined by links
goroot_from() {
  mv "$1"/usr/lib/go-* goroot
  find goroot -type l -delete
  cp -a "$1"/usr/share/go-*/. goroot/
  rm -r "$1"
}
make_go() {
  local pkg
  pkg=$(suite_apt forky depends golang-go | sed -n 's/.*Depends: \(golang-1.*-go\)$/\1/p')
  unpack forky "$pkg" "${pkg%-go}-src"
  goroot_from root
  GOROOT=$PWD/goroot goroot/bin/go version
}
find_go() {
  GO=$(command -v go || true)
  if [ -z "$GO" ] || ! go_suits "$GO"; then
    need go
    GO=$P/go/goroot/bin/go
    export GOROOT=$P/go/goroot
    go_suits "$GO" || die "no Go $(go_wanted) or later: neither the machine's nor Debian forky's is recent enough"
  fi
}
go_in() { # go_in MODULE-FOLDER SUBCOMMAND ARGS...: with separate caches and without the user's settings
  local dir=$1 cmd=$2
  shift 2
  (cd "$dir" && env GOFLAGS= GOWORK=off GOTOOLCHAIN="${GOTOOLCHAIN:-auto}" GOPATH="$WORK/gopath" GOCACHE="$WORK/gocache" \
    GOMODCACHE="$WORK/gomod" GOBIN="$WORK/gobin" CGO_ENABLED=0 nice -n 10 "$GO" "$cmd" -modcacherw "$@")
}
# containerd_built VERSION: builds containerd from its Go module, with the tags of upstream's static
# release. `go install` refuses a module with `exclude` lines, as 2.0 has, so a module of our own
# requires containerd.
containerd_built() {
  local m=github.com/containerd/containerd/v2 tags='urfave_cli_no_docs static_build' set
  set="-s -w -X $m/version.Version=v$1"
  mkdir module bin
  echo 'module testbed' > module/go.mod
  go_in module get "$m/cmd/containerd@v$1" "$m/cmd/ctr@v$1" "$m/cmd/containerd-shim-runc-v2@v$1"
  go_in module build -trimpath -tags "$tags osusergo netgo" -ldflags "$set" -o "$PWD/bin/" "$m/cmd/containerd" "$m/cmd/ctr"
  go_in module build -trimpath -tags "$tags no_grpc" -ldflags "$set" -o "$PWD/bin/" "$m/cmd/containerd-shim-runc-v2"
  rm -r module
  bin/containerd --version | tee versions
}
make_containerd-2.0() { containerd_built 2.0.14; } # only with LIGHTERMAN_CONTAINERD_EXTRA
make_containerd-2.3() { containerd_built 2.3.7; }  # long-term support
make_containerd-2.4() { containerd_built 2.4.2; }
make_k8s() {
  local v set='' m
  v=$(sed -nE 's|^(require)?[[:space:]]k8s.io/kubernetes (v[^ ]+).*|\2|p' "$TESTBED/kubernetes/go.mod")
  # Without these values the binaries report v0.0.0, and clients refuse that version.
  for m in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    set+=" -X $m.gitVersion=$v -X $m.gitMajor=1 -X $m.gitMinor=$(cut -d. -f2 <<< "$v") -X $m.gitTreeState=clean"
  done
  mkdir bin
  go_in "$TESTBED/kubernetes" build -trimpath -tags grpcnotrace -ldflags "-s -w$set" -o "$PWD/bin/" \
    k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kube-scheduler,kubelet,kubectl}
  bin/kubelet --version | tee versions
}
make_coredns() {
  mkdir bin
  go_in "$TESTBED/coredns" build -trimpath -ldflags '-s -w' -o "$PWD/bin/coredns" .
  # `head` would close the pipe early, and SIGPIPE would end coredns.
  bin/coredns -version | sed -n 1p | tee versions
}
make_helm() {
  mkdir bin
  go_in . install -trimpath -ldflags '-s -w' helm.sh/helm/v3/cmd/helm@latest
  mv "$WORK/gobin/helm" bin/
  bin/helm version --short | tee versions
}

mkdir -p "$P/log"
exec 9> "$P/.lock"
flock -n 9 || { say "another setup.sh is running; waiting"; flock 9; }
rm -rf "${WORK:?}/apt"
host_packages
for stamp in "$P"/.stamps/*; do
  p=${stamp##*/}
  [ ! -f "$stamp" ] || declare -F "make_$p" > /dev/null || rm -rf "${P:?}/$p" "$stamp" "$P/log/$p.log" "$P/versions.txt"
done
for p in containerd-1.7 tools; do need $p; done
find_go
for v in 2.3 2.4 ${LIGHTERMAN_CONTAINERD_EXTRA:-}; do
  declare -F "make_containerd-$v" > /dev/null || die "LIGHTERMAN_CONTAINERD_EXTRA: no make_containerd-$v in $0"
  need "containerd-$v"
done
need k8s "$TESTBED/kubernetes/go.sum"
need coredns "$TESTBED/coredns/go.sum" "$TESTBED/coredns/main.go"
part helm
[ -n "$MADE" ] || say "helm is missing; only tests of the chart need it"
[ ! -f "$P/versions.txt" ] || exit 0
rm -rf "$WORK"
mkdir -p "$P/bin"
for f in "$P"/{tools,coredns,helm}/bin/* "$P/k8s/bin/kubectl"; do [ ! -x "$f" ] || ln -sfn "$f" "$P/bin/"; done
for d in "$P"/*/versions; do sed "s|^|$(basename "$(dirname "$d")"): |" "$d"; done > "$P/versions.txt"
cat "$P/versions.txt"
say "ready: $(du -sh "$P" | cut -f1) in $P"
