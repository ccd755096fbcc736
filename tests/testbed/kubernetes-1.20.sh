# shellcheck shell=bash
# kubernetes-1.20.sh: the fallback when the current Kubernetes cannot be built (no Go modules at hand): 1.20 from Debian bookworm's
# own source package, with Debian's own Go. Sourced by setup.sh, whose `part` runs make_k8s-1.20 in an empty folder.
# What 1.20 lacks: EndpointSlices v1 (so no CoreDNS, no headless Service names), streaming lists, sidecars, policy/v1, ...
make_k8s-1.20() {
  local out=$PWD src v
  apt-get install -y -q -o DPkg::Lock::Timeout=120 --no-install-recommends make rsync dpkg-dev gcc libc6-dev
  mkdir source
  (cd source && suite_apt bookworm source kubernetes)
  src=$(echo source/kubernetes-1.20*/)
  # Debian's Go in a GOROOT of its own: a newer one on the PATH would not build this
  unpack bookworm golang-1.19-go golang-1.19-src
  goroot_from root
  # the vendored reflect2 does not compile with Go 1.18 and later
  unpack bookworm golang-github-modern-go-reflect2-dev
  v=$src/vendor/github.com/modern-go/reflect2
  rm -f "$v"/*.go "$v"/*.s
  cp root/usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} "$v/"
  # This kubelet speaks CRI v1alpha2, which containerd 2 no longer does; v1 is the same on the wire but for the service's name
  sed -i -E 's#"(/?)runtime\.v1alpha2\.(Runtime|Image)Service#"\1runtime.v1.\2Service#' "$src/staging/src/k8s.io/cri-api/pkg/apis/runtime/v1alpha2/api.pb.go"
  mkdir -p "$src/.go/src/k8s.io" home bin
  ln -s ../../.. "$src/.go/src/k8s.io/kubernetes"
  (cd "$src" && env -u GOFLAGS PATH="$out/goroot/bin:$PATH" GOROOT="$out/goroot" GOPATH="$PWD/.go" HOME="$out/home" CGO_ENABLED=0 \
    GOPROXY=off GO111MODULE=auto KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20 KUBE_GIT_COMMIT=debian KUBE_GIT_TREE_STATE=archive \
    nice -n 10 make WHAT="cmd/kube-apiserver cmd/kube-controller-manager cmd/kube-scheduler cmd/kubelet cmd/kubectl" GOLDFLAGS="-s -w")
  cp -L "$src"/_output/bin/{kube-apiserver,kube-controller-manager,kube-scheduler,kubelet,kubectl} bin/
  chmod -R u+w .
  rm -rf source home goroot root
  bin/kubelet --version | tee versions
}
