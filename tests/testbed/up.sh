#!/bin/bash
# up.sh RUNDIR NAME=1.7|2.3|2.4 ...: starts a Kubernetes cluster on this machine, with a real node
# per NAME that runs this containerd. Returns when every node is Ready. RUNDIR/env then has the
# addresses and paths of all parts (KEY=VALUE lines). down.sh RUNDIR stops the cluster.
#
# The hub is a network namespace with a bridge, 10.77.0.1/24: etcd, the control plane (:443, also as
# 10.96.0.1), CoreDNS (10.96.0.10:53) and a registry (:5000, plain HTTP). A node is a network
# namespace (10.77.0.11 and up, pods in 10.78.N.0/24) and a mount namespace with private
# /var/lib/containerd, /run and so on: a DaemonSet finds the paths of an ordinary node.
#
#   LIGHTERMAN_FAMILY=ipv4             or ipv6: all parts at fd77::1, fd96::1, fd96::10, fd77::11
#                                      and up, fd78:0:0:N::/64, and no IPv4 but loopback's;
#                                      or dual: both families, IPv4 first
#   LIGHTERMAN_SYNC_FREQUENCY=1m       the kubelets' sync period
#   LIGHTERMAN_ZONES="n1=a n2=b"       label topology.kubernetes.io/zone
#   LIGHTERMAN_DISCARD_LAYERS="n1 n2"  nodes whose containerd deletes layers after unpacking
#   LIGHTERMAN_DISK="n1 n2"            nodes whose containerd has a file system of 40 GiB (sparse),
#                                      with the kubelet's default thresholds
#   LIGHTERMAN_READ_ONLY_OPT="n1 n2"   nodes whose /opt is empty and read-only, as on GKE's
#                                      Container-Optimized OS
#   LIGHTERMAN_CRITICAL_QUOTA=1        pods of the system priority classes need a ResourceQuota, as
#                                      on GKE
#   LIGHTERMAN_PULL_TIMEOUT="n1=150s"  containerd's image_pull_progress_timeout
#   LIGHTERMAN_PARALLEL_PULLS="n1=3"   images that the kubelet pulls at the same time
#   LIGHTERMAN_PROXIES="HTTPS_PROXY=URL NO_PROXY=..."  the environment of all containerds
#   LIGHTERMAN_PATIENCE=3              factor on all time limits, for slow machines
. "$(dirname "$0")/lib.sh"
[ $# -ge 2 ] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ "$(id -u)" = 0 ] || die "run as root: the test bed makes namespaces and mounts"
R=$(realpath -m "$1")
shift
K8S=$P/k8s/bin
[ -f "$P/versions.txt" ] && [ -x "$K8S/kubelet" ] || die "$P has no binaries: run setup.sh first"
[[ $R != *[^A-Za-z0-9/._-]* ]] || die "RUNDIR must be a plain path: $R"
[ -z "${LIGHTERMAN_READ_ONLY_OPT:-}" ] || [[ $P/ != /opt/* && $R/ != /opt/* ]] || die "an empty /opt would hide $P or $R"
[[ $R/ != /run/* ]] || die "RUNDIR must not be below /run, which is private on every node: $R"
if [ -f "$R/tag" ]; then
  TAG=$(< "$R/tag")
  [ -z "$(cgroup_pids)" ] || die "a test bed already runs in $R: stop it with down.sh $R"
  "$TESTBED/down.sh" "$R" # removes the rest of an aborted run
fi
declare -A CONTAINERD=() ZONE=()
NODES=()
for spec in "$@"; do
  n=${spec%%=*} v=${spec#*=}
  # The interface v-NAME has at most 15 characters.
  [[ $n =~ ^[a-z][a-z0-9]{0,11}$ && $n != hub ]] || die "a node's name is 1-12 of a-z0-9, and not 'hub': $n"
  [ -x "$P/containerd-$v/bin/containerd" ] || die "$spec: no containerd '$v'; setup.sh built: $(cd "$P" && echo containerd-*)"
  [ -z "${CONTAINERD[$n]:-}" ] || die "two nodes named $n"
  s=$R/$n/run/containerd.sock.ttrpc
  [ ${#s} -lt 104 ] || die "RUNDIR is too long for a Unix socket ($s)"
  CONTAINERD[$n]=$P/containerd-$v NODES+=("$n")
done
for z in ${LIGHTERMAN_ZONES:-}; do ZONE[${z%%=*}]=${z#*=}; done
[ ${#NODES[@]} -le 200 ] || die "a test bed has at most 200 nodes"
# shellcheck source=tests/testbed/family.sh
. "$TESTBED/family.sh"
listed() { [[ " $2 " == *" $1 "* ]]; } # listed NODE "n1 n2"

mkdir -p "$R"/{run,pid,log,pki}
TAG=lm$(printf '%s %s %s' "$R" $$ "$EPOCHREALTIME" | sha256sum | head -c 6)
echo "$TAG" > "$R/tag"
FAILED='' WHY='' code=0
set -E
trap 'WHY="line $LINENO: $BASH_COMMAND"' ERR
trap 'code=$?; trap - EXIT; [ $code = 0 ] || { broken; "$TESTBED/down.sh" "$R"; }; exit $code' EXIT
trap 'exit 130' INT TERM
broken() {
  [ -n "$FAILED" ] || { echo "up.sh: ${WHY:-stopped}; cleaning up" >&2; return 0; }
  printf 'up.sh: %s: %s. The end of %s:\n' "$FAILED" "$WHY" "$R/log/$FAILED.log" >&2
  tail -n 15 "$R/log/$FAILED.log" | cut -c1-400 >&2
}
# await COMPONENT SECONDS COMMAND...: waits until COMMAND succeeds. Fails when COMPONENT ends or
# time is up
await() {
  local component=$1 limit=$(($2 * ${LIGHTERMAN_PATIENCE:-1})) deadline
  deadline=$((SECONDS + limit))
  shift 2
  until "$@" > /dev/null 2>&1; do
    if ! alive "$component" && sleep 0.1 && ! alive "$component"; then FAILED=$component WHY="the process ended"; exit 1; fi
    if [ $SECONDS -ge $deadline ]; then FAILED=$component WHY="not ready after $limit s ($*)"; exit 1; fi
    sleep 0.1
  done
}

# ---- certificates: a single CA for everything, as with kubeadm
(
  cd "$R/pki"
  exec 2> ../log/openssl.log
  key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
  openssl req -x509 "${key[@]}" -days 3650 -subj /CN=lighterman-testbed -keyout ca.key -out ca.crt \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign -addext subjectKeyIdentifier=hash
  cert() { # cert FILE SUBJECT [SAN]
    openssl req -new "${key[@]}" -subj "$2" -keyout "$1.key" -out "$1.csr"
    printf '%s\n' basicConstraints=CA:FALSE keyUsage=digitalSignature extendedKeyUsage=serverAuth,clientAuth ${3:+"subjectAltName=$3"} > "$1.ext"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -extfile "$1.ext" -out "$1.crt"
  }
  cert apiserver /CN=kube-apiserver "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,DNS:localhost,$(printf 'IP:%s,' "${API_IPS[@]}" "${HUB_IPS[@]}")IP:127.0.0.1"
  cert apiserver-kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client
  cert admin /O=system:masters/CN=kubernetes-admin
  cert controller-manager /CN=system:kube-controller-manager
  cert scheduler /CN=system:kube-scheduler
  cert coredns /O=system:masters/CN=coredns
  for n in "${NODES[@]}"; do cert "$n" "/O=system:nodes/CN=system:node:$n" "DNS:$n$(printf ',IP:%s' $(ips_of "$n"))"; done
  openssl genrsa -out sa.key 2048 # RSA, as in most clusters: verifiers see RS256
  openssl rsa -in sa.key -pubout -out sa.pub
) || { FAILED=openssl WHY="no certificates"; exit 1; }
kubeconfig() { # kubeconfig CERTIFICATE
  cat << C
apiVersion: v1
kind: Config
current-context: testbed
clusters:
  - name: testbed
    cluster: { server: "https://$(in_url "$HUB_IP"):443", certificate-authority-data: $(base64 -w0 "$R/pki/ca.crt") }
users:
  - name: $1
    user: { client-certificate-data: $(base64 -w0 "$R/pki/$1.crt"), client-key-data: $(base64 -w0 "$R/pki/$1.key") }
contexts:
  - name: testbed
    context: { cluster: testbed, user: $1 }
C
}
for n in controller-manager scheduler coredns "${NODES[@]}"; do kubeconfig "$n" > "$R/pki/$n.kubeconfig"; done
kubeconfig admin > "$R/admin.kubeconfig"

# ---- networks: all inside namespaces; the host has only their names in /run/netns
HUB=$TAG-hub
ip netns add "$HUB"
ip -n "$HUB" link set lo up
ip -n "$HUB" link add br0 type bridge
for ip in "${HUB_IPS[@]}"; do add_address "$HUB" "$(node_link "$ip")" br0; done
# The addresses of the Services kubernetes.default and kube-dns: there is no kube-proxy
for ip in "${API_IPS[@]}" "${DNS_IPS[@]}"; do add_address "$HUB" "$(whole_address "$ip")" br0; done
ip -n "$HUB" link set br0 up
cgroup_make "$HUB"
for n in "${NODES[@]}"; do
  ns=$TAG-$n
  ip netns add "$ns"
  ip -n "$ns" link set lo up
  ip -n "$HUB" link add "v-$n" type veth peer name eth0 netns "$ns"
  ip -n "$HUB" link set "v-$n" master br0 up
  for ip in $(ips_of "$n"); do add_address "$ns" "$(node_link "$ip")" eth0; done
  ip -n "$ns" link set eth0 up
  # There is no default route: connections to the outside fail at once
  routes_of "$n" | while read -r network gateway; do ip -n "$ns" route add "$network" via "$gateway"; done
  for ip in $(ips_of "$n"); do ip -n "$HUB" route add "$(pods_of "$ip")" via "$ip"; done
  in_net "$n" sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'
  [ "$FAMILY" = ipv4 ] || in_net "$n" sh -c 'echo 1 > /proc/sys/net/ipv6/conf/all/forwarding'
  cgroup_make "$ns"
done

# ---- the hub's components
hub="nsenter --net=/run/netns/$HUB"
pki=$R/pki
fsync=--unsafe-no-fsync
admission=
if [ -n "${LIGHTERMAN_CRITICAL_QUOTA:-}" ]; then
  admission=--admission-control-config-file=$R/admission.yaml
  cat > "$R/admission.yaml" << C
apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
  - name: ResourceQuota
    configuration:
      apiVersion: apiserver.config.k8s.io/v1
      kind: ResourceQuotaConfiguration
      limitedResources:
        - { resource: pods, matchScopes: [{ scopeName: PriorityClass, operator: In, values: [system-node-critical, system-cluster-critical] }] }
C
fi
"$P/tools/bin/etcd" --help 2>&1 | grep -q -- $fsync || fsync= # since 3.5
define etcd hub << C
exec $hub $P/tools/bin/etcd --name hub --data-dir $R/etcd $fsync --listen-client-urls http://$LOOPBACK:2379 --advertise-client-urls http://$LOOPBACK:2379 \\
  --listen-peer-urls http://$LOOPBACK:2380 --initial-advertise-peer-urls http://$LOOPBACK:2380 --initial-cluster hub=http://$LOOPBACK:2380
C
define apiserver hub << C
exec $hub $K8S/kube-apiserver --etcd-servers=http://$LOOPBACK:2379 --bind-address=$ANY --secure-port=443 --advertise-address=$HUB_IP \\
  --tls-cert-file=$pki/apiserver.crt --tls-private-key-file=$pki/apiserver.key --client-ca-file=$pki/ca.crt \\
  --kubelet-client-certificate=$pki/apiserver-kubelet-client.crt --kubelet-client-key=$pki/apiserver-kubelet-client.key \\
  --kubelet-certificate-authority=$pki/ca.crt --kubelet-preferred-address-types=InternalIP \\
  --service-account-issuer=https://kubernetes.default.svc.cluster.local --service-account-key-file=$pki/sa.pub --service-account-signing-key-file=$pki/sa.key \\
  --service-cluster-ip-range=$(joined "${SERVICES[@]}") --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true $admission
C
define controller-manager hub << C
exec $hub $K8S/kube-controller-manager --kubeconfig=$pki/controller-manager.kubeconfig --bind-address=127.0.0.1 --leader-elect=false \\
  --root-ca-file=$pki/ca.crt --service-account-private-key-file=$pki/sa.key --use-service-account-credentials \\
  --cluster-signing-cert-file=$pki/ca.crt --cluster-signing-key-file=$pki/ca.key
C
define scheduler hub << C
exec $hub $K8S/kube-scheduler --kubeconfig=$pki/scheduler.kubeconfig --bind-address=127.0.0.1 --leader-elect=false
C
cat > "$R/registry.yml" << C
version: 0.1
log: { level: info, accesslog: { disabled: false } }
storage: { filesystem: { rootdirectory: $R/registry }, delete: { enabled: true } }
http: { addr: "$REGISTRY_LISTEN" }
C
define registry hub << C
exec $hub env OTEL_TRACES_EXPORTER=none $P/tools/bin/docker-registry serve $R/registry.yml
C
# Names outside the cluster do not exist, except those in RUNDIR/hosts (read again every second)
printf '%s registry.test\n' "${HUB_IPS[@]}" > "$R/hosts"
cat > "$R/Corefile" << C
cluster.local ${REVERSE_ZONES[*]} {
  bind ${DNS_IPS[*]}
  errors
  kubernetes {
    kubeconfig $pki/coredns.kubeconfig
    ttl 1
  }
}
. {
  bind ${DNS_IPS[*]}
  errors
  hosts $R/hosts {
    ttl 1
    reload 1s
  }
}
C
define coredns hub << C
exec $hub $P/coredns/bin/coredns -conf $R/Corefile
C

# ---- a node's components
# containerd 2 has another version of the configuration, with two plugins for CRI
containerd_config() { # containerd_config NODE
  local n=$1 images='io.containerd.grpc.v1.cri' runtime='io.containerd.grpc.v1.cri' version=2 sandbox='' pinned='' bin="bin_dir = \"$P/tools/cni\"" discard=false
  ! listed "$n" "${LIGHTERMAN_DISCARD_LAYERS:-}" || discard=true
  if "${CONTAINERD[$n]}/bin/containerd" --version | grep -qE ' v?[2-9]\.[0-9]'; then
    version=3 images='io.containerd.cri.v1.images' runtime='io.containerd.cri.v1.runtime' bin="bin_dirs = [\"$P/tools/cni\"]"
    ! "${CONTAINERD[$n]}/bin/containerd" --version | grep -qE ' v?2\.0\.' || bin="bin_dir = \"$P/tools/cni\"" # a list since 2.1
    pinned="[plugins.'$images'.pinned_images]"$'\n''sandbox = "local.test/pause:1"'
    discard="[plugins.'$images']"$'\n'"discard_unpacked_layers = $discard"
  else
    sandbox='sandbox_image = "local.test/pause:1"'
    discard="[plugins.'$images'.containerd]"$'\n'"discard_unpacked_layers = $discard"
  fi
  cat << C
version = $version
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
address = "/run/containerd/containerd.sock"
[plugins.'io.containerd.internal.v1.opt']
path = "$R/$n/opt"
[plugins.'io.containerd.nri.v1.nri']
disable = true
$discard
$pinned
[plugins.'$images'.registry]
config_path = "/etc/containerd/certs.d"
[plugins.'$runtime']
$sandbox
# Without CAP_SYS_RESOURCE every sandbox would fail: "can't get final child's PID from pipe: EOF"
restrict_oom_score_adj = true
[plugins.'$runtime'.cni]
$bin
conf_dir = "/etc/cni/net.d"
[plugins.'$runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins.'$runtime'.containerd.runtimes.runc.options]
BinaryName = "$P/tools/bin/runc"
SystemdCgroup = false
C
}
# Private folders of a node, by their place in the node. Empty folders on the host serve as mount
# points; the last down.sh removes them
PRIVATE="/var/lib/containerd:root /var/lib/kubelet:kubelet /var/lib/cni:cni /var/lib/lighterman:lighterman
  /var/log/pods:pods /var/log/containers:containers /etc/containerd:etc /etc/cni/net.d:net.d"
for p in $PRIVATE; do
  at=${p%%:*}
  [ -d "${at%/*}" ] || { mkdir "${at%/*}"; echo "${at%/*}" >> "$MOUNTPOINTS"; }
  [ -d "$at" ] || { mkdir "$at"; echo "$at" >> "$MOUNTPOINTS"; }
done
# The kubelet writes these kernel settings for the whole machine where they differ: files with the
# expected values prevent that
SYSCTLS="vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000"
v2=/sys/fs/cgroup
cgroup_v2 || v2=/sys/fs/cgroup/unified
for n in "${NODES[@]}"; do
  d=$R/$n bin=${CONTAINERD[$n]}/bin
  mkdir -p "$d"/{root,run,kubelet,cni,lighterman,pods,containers,etc/certs.d,net.d,opt,manifests,sysctl}
  for registry in registry.test "${HUB_IPS[@]}"; do
    registry=$(in_url "$registry"):5000
    mkdir "$d/etc/certs.d/$registry"
    # containerd 1.7 tries a bare `server = "http://..."` as https, and ignores a [host] section
    # whose name has a bracket
    printf 'server = "http://%s"\nhost."http://%s".capabilities = ["pull", "resolve"]\n' "$registry" "$registry" > "$d/etc/certs.d/$registry/hosts.toml"
  done
  containerd_config "$n" > "$d/etc/config.toml"
  cat > "$d/net.d/10-bridge.conflist" << C
{"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
  "ipam": {"type": "host-local", "ranges": [$(ranges_of "$n")], "routes": [$(joined "${DEFAULTS[@]}")]}}]}
C
  printf 'nameserver %s\n' "${DNS_IPS[@]}" > "$d/resolv.conf"
  for s in $SYSCTLS; do echo "${s#*=}" > "$d/sysctl/$(tr / . <<< "${s%%=*}")"; done
  mounts='' collect=100 evict='memory.available: 50Mi'
  if listed "$n" "${LIGHTERMAN_DISK:-}"; then
    # No blocks are reserved for root, so "available" is the space not in use. The loop device ends
    # with the mount namespace.
    truncate -s 40G "$d/disk.img"
    mkfs.ext4 -q -F -m 0 "$d/disk.img" > "$R/log/$n.mkfs.log" 2>&1
    mounts="mount -o loop $d/disk.img /var/lib/containerd" collect=85 evict+=', imagefs.available: 15%'
  fi
  if listed "$n" "${LIGHTERMAN_READ_ONLY_OPT:-}"; then
    mkdir "$d/empty"
    mounts+=$'\n'"mount --bind $d/empty /opt && mount -o remount,bind,ro /opt"
  fi
  cat > "$d/kubelet.yaml" << C
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: "$(ip_of "$n")"
authentication: { anonymous: { enabled: false }, webhook: { enabled: true }, x509: { clientCAFile: $pki/ca.crt } }
authorization: { mode: Webhook }
tlsCertFile: $pki/$n.crt
tlsPrivateKeyFile: $pki/$n.key
clusterDNS: ["${DNS_IPS[0]}"]
clusterDomain: cluster.local
resolvConf: $d/resolv.conf
staticPodPath: $d/manifests
cgroupDriver: cgroupfs
cgroupRoot: /$TAG-$n
enforceNodeAllocatable: []
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
imageGCHighThresholdPercent: $collect
evictionHard: { $evict }
syncFrequency: ${LIGHTERMAN_SYNC_FREQUENCY:-1m}
failCgroupV1: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
C
  for s in ${LIGHTERMAN_PULL_TIMEOUT:-}; do
    [ "${s%%=*}" != "$n" ] || sed -i "s/^\[plugins\.'io\.containerd\.\(grpc\.v1\.cri\|cri\.v1\.images\)'\]\$/&\nimage_pull_progress_timeout = \"${s#*=}\"/" "$d/etc/config.toml"
  done
  for s in ${LIGHTERMAN_PARALLEL_PULLS:-}; do
    [ "${s%%=*}" != "$n" ] || printf 'serializeImagePulls: false\nmaxParallelImagePulls: %s\n' "${s#*=}" >> "$d/kubelet.yaml"
  done
  define "$n.mounts" "$n" << C
exec nsenter --net=/run/netns/$TAG-$n unshare --mount --propagation private $R/run/$n.mounted
C
  define "$n.mounted" "$n" << C
umount -R -l /run/netns
# A private /run (netns, nri, xtables.lock): a kubelet deletes the pods of another kubelet
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/containerd /run/netns /run/lock
mount --bind $d/run /run/containerd
for p in $(echo $PRIVATE); do mount --bind $d/\${p#*:} \${p%%:*}; done
$mounts
for s in $d/sysctl/*; do mount --bind \$s /proc/sys/\$(basename \$s | tr . /) || true; done
resolv=\$(readlink -m /etc/resolv.conf) # systemd-resolved keeps the file below /run, which is hidden now
[ -f \$resolv ] || { mkdir -p \${resolv%/*}; touch \$resolv; }
mount --bind $d/resolv.conf \$resolv
mount --make-rshared /
touch $d/mounted
exec $P/tools/bin/busybox sleep 2147483647
C
  node="nsenter --net=/run/netns/$TAG-$n --mount=/proc/\$(cat $R/pid/$n.mounts)/ns/mnt"
  define "$n.containerd" "$n" << C
export PATH=$bin:$P/tools/bin:/usr/sbin:/usr/bin:/sbin:/bin
$(for s in ${LIGHTERMAN_PROXIES:-}; do echo "export $s"; done)
# A cgroup of its own in the v2 tree, as for a systemd service
if [ -f $v2/cgroup.procs ]; then
  mkdir -p $v2/$TAG-$n/containerd
  echo \$\$ > $v2/$TAG-$n/containerd/cgroup.procs
fi
exec $node $bin/containerd --config /etc/containerd/config.toml
C
  define "$n.kubelet" "$n" << C
export PATH=$bin:$P/tools/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec $node $K8S/kubelet --config=$d/kubelet.yaml --kubeconfig=$pki/$n.kubeconfig --hostname-override=$n --node-ip=$(joined $(ips_of "$n")) ${ZONE[$n]:+--node-labels=topology.kubernetes.io/zone=${ZONE[$n]}}
C
done

# ---- start, in the order of dependencies
{
  echo "TAG=$TAG"
  echo "HUB_NETNS=$HUB"
  echo "KUBECONFIG=$R/admin.kubeconfig"
  echo "KUBECTL=$K8S/kubectl"
  echo "FAMILY=$FAMILY"
  echo "HUB_IP=$HUB_IP"
  echo "DNS_IP=${DNS_IPS[0]}"
  echo "REGISTRY=$(in_url "$HUB_IP"):5000"
  echo "NODES=$(IFS=,; echo "${NODES[*]}")"
  for n in "${NODES[@]}"; do
    echo "NODE_${n}_NETNS=$TAG-$n"
    echo "NODE_${n}_IP=$(ip_of "$n")"
    echo "NODE_${n}_IPS=$(joined $(ips_of "$n"))"
    echo "NODE_${n}_SOCKET=$R/$n/run/containerd.sock"
    echo "NODE_${n}_CTR=${CONTAINERD[$n]}/bin/ctr"
    echo "NODE_${n}_CONTAINERD=$("${CONTAINERD[$n]}/bin/containerd" --version | awk '{ sub("^v", "", $3); print $3 }')"
    echo "NODE_${n}_ROOT=$R/$n/root"
    echo "NODE_${n}_CONFIG=$R/$n/etc"
    echo "NODE_${n}_STATE=$R/$n/lighterman"
    echo "NODE_${n}_MANIFESTS=$R/$n/manifests"
    echo "NODE_${n}_PIDFILE=$R/pid/$n.mounts"
  done
} > "$R/env.new"

start etcd
start registry
for n in "${NODES[@]}"; do start "$n.mounts"; done
"$TESTBED/mkimage.sh" "$R/pause.tar" local.test/pause:1 --file "$P/tools/bin/busybox:/busybox" --entrypoint '/busybox,sh,-c,while /busybox sleep 3600; do :; done' > "$R/log/pause.json"
await etcd 20 in_net hub curl -sf http://$LOOPBACK:2379/health
start apiserver
for n in "${NODES[@]}"; do await "$n.mounts" 10 test -f "$R/$n/mounted"; start "$n.containerd"; done
for n in "${NODES[@]}"; do
  ctr="${CONTAINERD[$n]}/bin/ctr -a $R/$n/run/containerd.sock -n k8s.io"
  await "$n.containerd" 30 $ctr version
  await "$n.containerd" 30 $ctr images import "$R/pause.tar"
done
await apiserver 60 kubectl get --raw /readyz
start controller-manager
start scheduler
start coredns
for n in "${NODES[@]}"; do start "$n.kubelet"; done
# A Service takes the address of DNS, so that no other Service gets the address
kubectl create -f - > "$R/log/services.log" 2>&1 << C || { FAILED=services WHY="cannot create kube-dns"; exit 1; }
apiVersion: v1
kind: Service
metadata: { name: kube-dns, namespace: kube-system }
spec: { clusterIP: "${DNS_IPS[0]}", ports: [{ name: dns, port: 53, protocol: UDP }, { name: dns-tcp, port: 53, protocol: TCP }] }
C
await controller-manager 30 kubectl get serviceaccount/default configmap/kube-root-ca.crt
ready() { [ "$(kubectl get node "$1" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ]; }
for n in "${NODES[@]}"; do await "$n.kubelet" 60 ready "$n"; done
for c in scheduler registry coredns; do await $c 10 alive $c; done
await registry 10 in_net hub curl -sf "http://$(in_url "$HUB_IP"):5000/v2/"
await coredns 20 dns_answers "${DNS_IPS[0]}"
mv "$R/env.new" "$R/env"
say "up: ${#NODES[@]} nodes Ready, Kubernetes $("$K8S/kubelet" --version | awk '{ print $2 }'), tag $TAG, $R/env"
