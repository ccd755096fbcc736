#!/bin/bash
# smoke.sh RUNDIR [NAME=VERSION ...]: shows that the test bed is a real cluster. Starts a cluster
# (three nodes by default, one per containerd) and checks
#   1. a pod on each node that pulls from the registry, on one node from an index of two platforms
#   2. a pod whose registry is down: the pull backs off, the image is imported by hand, and a nudge
#      of the pod's status makes the pod run
#   3. a DaemonSet with hostNetwork and hostPath volumes: each pod sees containerd's socket and
#      blobs, finds its peers by a headless Service though no pod is ready, and authenticates at the
#      API server with its ServiceAccount token
#   4. each fault of ctl.sh, and the recovery from it
# Then stops the cluster. The exit code is 0 only if all checks passed.
. "$(dirname "$0")/lib.sh"
[ $# -ge 1 ] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
R=$(realpath -m "$1")
shift
[ $# -gt 0 ] || set -- n17=1.7 n23=2.3 n24=2.4
code=0
trap 'code=$?; trap - EXIT; "$TESTBED/down.sh" "$R"; [ $code = 0 ] || echo "smoke.sh: FAILED" >&2; exit $code' EXIT
"$TESTBED/up.sh" "$R" "$@"
load "$R"
ctl() { "$TESTBED/ctl.sh" "$R" "$@"; }
IFS=, read -ra nodes <<< "$NODES"
last=${nodes[-1]}
within() { # within SECONDS WHAT COMMAND...
  local deadline=$((SECONDS + $1 * ${LIGHTERMAN_PATIENCE:-1})) what=$2
  shift 2
  until "$@" > /dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || { kubectl get pods -A -o wide; kubectl get events | tail -n 8; die "time-out: $what"; }
    sleep 0.1
  done
  say "$what"
}
fails() { ! "$@"; }
running() { [ "$(kubectl get pod "$1" -o jsonpath='{.status.phase}')" = Running ]; }
waiting() { [ "$(kubectl get pod "$1" -o jsonpath='{.status.containerStatuses[0].state.waiting.reason}')" = "$2" ]; }
pod() { # pod NAME NODE IMAGE
  kubectl create -f - > /dev/null << Y
{apiVersion: v1, kind: Pod, metadata: {name: $1}, spec: {nodeName: $2, terminationGracePeriodSeconds: 0, containers: [{name: c, image: "$3", imagePullPolicy: IfNotPresent}]}}
Y
}
kubectl get nodes -o custom-columns=NODE:.metadata.name,KUBELET:.status.nodeInfo.kubeletVersion,CONTAINERD:.status.nodeInfo.containerRuntimeVersion

# 1
box=(--file "$P/tools/bin/busybox:/bin/busybox" --link /bin/sh:busybox --entrypoint '/bin/busybox,sleep,99999')
"$TESTBED/mkimage.sh" "$R/one.tar" "$REGISTRY/smoke/one:1" "${box[@]}" --random 3 --gzip > /dev/null
"$TESTBED/mkimage.sh" "$R/many.tar" registry.test:5000/smoke/many:1 "${box[@]}" --multiarch > /dev/null
ctl push "$R/one.tar" "$REGISTRY/smoke/one:1"
ctl push "$R/many.tar" registry.test:5000/smoke/many:1
for n in "${nodes[@]}"; do pod "pull-$n" "$n" "$REGISTRY/smoke/one:1"; done
pod pull-index "${nodes[0]}" registry.test:5000/smoke/many:1
for n in "${nodes[@]}"; do within 30 "$n pulled from the registry and runs" running "pull-$n"; done
within 30 "${nodes[0]} pulled an index of two platforms, by the registry's name" running pull-index

# 2
dead=10.77.0.1:5999/smoke/dead:1
"$TESTBED/mkimage.sh" "$R/dead.tar" $dead "${box[@]}" --random 1 > /dev/null
for n in "${nodes[@]}"; do pod "dead-$n" "$n" $dead; done
for n in "${nodes[@]}"; do
  within 60 "$n backs off from a dead registry" waiting "dead-$n" ImagePullBackOff
  ctl ctr "$n" images import "$R/dead.tar" > /dev/null
  kubectl patch pod "dead-$n" --subresource=status --type=merge -p '{"metadata":{"annotations":{"smoke/nudged":"now"}}}' > /dev/null
  t=$EPOCHREALTIME
  within 8 "$n runs after import and nudge" running "dead-$n"
  say "    $(((${EPOCHREALTIME/[.,]/} - ${t/[.,]/}) / 1000)) ms after the nudge"
done

# 3
"$TESTBED/mkimage.sh" "$R/agent.tar" "$REGISTRY/smoke/agent:1" --file "$P/tools/bin/busybox:/bin/busybox" --link /bin/sh:busybox --entrypoint /bin/busybox,sh > /dev/null
ctl push "$R/agent.tar" "$REGISTRY/smoke/agent:1"
kubectl create -f - > /dev/null << Y
apiVersion: v1
kind: Service
metadata: {name: peers}
spec: {clusterIP: None, publishNotReadyAddresses: true, selector: {app: agent}, ports: [{port: 4001, name: quic, protocol: UDP}]}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      hostNetwork: true
      dnsPolicy: ClusterFirstWithHostNet
      terminationGracePeriodSeconds: 0
      containers:
        - name: agent
          image: $REGISTRY/smoke/agent:1
          args: [-c, "busybox mkdir -p /var/lib/lighterman/me; exec busybox nc -ll -p 4001 -e /bin/busybox echo \$NODE"]
          env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
          readinessProbe: {exec: {command: [/bin/busybox, "false"]}}
          volumeMounts:
            - {name: run, mountPath: /run/containerd}
            - {name: store, mountPath: /var/lib/containerd}
            - {name: state, mountPath: /var/lib/lighterman}
      volumes:
        - {name: run, hostPath: {path: /run/containerd}}
        - {name: store, hostPath: {path: /var/lib/containerd}}
        - {name: state, hostPath: {path: /var/lib/lighterman, type: DirectoryOrCreate}}
Y
agent_on() { kubectl get pods -l app=agent --field-selector "spec.nodeName=$1" -o 'jsonpath={.items[0].metadata.name}'; }
in_agent() { local n=$1; shift; kubectl exec "$(agent_on "$n")" -- /bin/busybox "$@"; }
all_running() { local n; for n in "${nodes[@]}"; do running "$(agent_on "$n")" || return 1; done; }
within 30 "the DaemonSet runs on every node (exec works, so do the kubelets' certificates)" all_running
for n in "${nodes[@]}"; do
  in_agent "$n" test -S /run/containerd/containerd.sock || die "$n: no socket in the pod"
  in_agent "$n" test -f "/var/lib/containerd/io.containerd.content.v1.content/blobs/sha256/$(tar tf "$R/one.tar" | sed -n 's|^blobs/sha256/||p' | grep . | tail -n 1)" || die "$n: no blob in the pod"
  [ -d "$R/$n/lighterman/me" ] || die "$n: hostPath is not the node's own"
done
say "every agent sees the socket, blobs and folder of its own node"
peers_by_name() {
  local n found
  found=$(in_agent "$last" nslookup -type=a peers.default.svc.cluster.local)
  for n in "${nodes[@]}"; do ip=NODE_${n}_IP; grep -qw "${!ip}" <<< "$found" || return 1; done
}
within 15 "the headless Service's name gives every agent's address, ready or not" peers_by_name
for n in "${nodes[@]}"; do
  ip=NODE_${n}_IP
  [ "$(in_agent "$last" nc -w 2 "${!ip}" 4001 < /dev/null)" = "$n" ] || die "$last cannot reach the agent of $n"
done
say "each agent answers at its address"
# busybox cannot verify TLS certificates, so curl runs in the node's network with the pod's token
# and CA.
in_agent "$last" cat /var/run/secrets/kubernetes.io/serviceaccount/token > "$R/token"
in_agent "$last" cat /var/run/secrets/kubernetes.io/serviceaccount/ca.crt > "$R/token-ca.crt"
keys=$(ctl in "$last" curl -sSf --cacert "$R/token-ca.crt" --resolve kubernetes.default.svc:443:10.96.0.1 -H "Authorization: Bearer $(< "$R/token")" https://kubernetes.default.svc/openid/v1/jwks | jq '.keys | length')
[ "$keys" -ge 1 ] || die "no keys at /openid/v1/jwks"
say "a pod's token and CA open https://kubernetes.default.svc: $keys signing key, token for $(cut -d. -f2 "$R/token" | tr -- -_ +/ | base64 -d 2> /dev/null | jq -c '[.iss, .sub, ."kubernetes.io".node.name]')"

# 4
v2() { ctl in "$last" curl -s -m 1 -o /dev/null "http://$REGISTRY/v2/"; }
v2
ctl registry stop; fails v2 || die "the registry still answers"
ctl registry start; v2
ctl registry drop; code=0; v2 || code=$?; [ $code = 28 ] || die "curl ends with $code instead of a time-out"
ctl registry undrop; v2
ctl node "$last" link-down; fails v2 || die "the link is up"
ctl node "$last" link-up; within 5 "registry stop, registry drop and link-down took effect and are over" v2
ctl apiserver stop; fails kubectl get --raw /readyz > /dev/null 2>&1 || die "the API server still answers"
ctl node "$last" containerd-kill
fails ctl ctr "$last" version > /dev/null 2>&1 || die "containerd still answers"
ctl node "$last" containerd-start
ctl apiserver start
ctl node "$last" kubelet-stop
ctl node "$last" kubelet-start
within 30 "API server, containerd and kubelet restarted; pods still run" running "pull-$last"
restarts=$(kubectl get pods -o 'jsonpath={.items[*].status.containerStatuses[*].restartCount}')
[ -z "${restarts//[0 ]/}" ] || { kubectl get pods; die "containers were restarted"; }
printf 'scrape_configs: []\n' > "$R/prometheus.yml"
ctl prometheus "$R/prometheus.yml" 9090
say "prometheus: $(ctl in hub curl -sf http://10.77.0.1:9090/api/v1/status/buildinfo | jq -r .data.version)"
rss() { local p; for p in $(cgroup_pids); do cat "/proc/$p/smaps_rollup" 2> /dev/null; done | awk '/^Pss:/ { s += $2 } END { printf "%d MiB", s / 1024 }'; }
say "memory of everything: $(rss), disk of $R: $(du -sm "$R" | cut -f1) MiB"
"$TESTBED/down.sh" "$R"
[ -z "$(cgroup_pids)" ] && ! compgen -G "/run/netns/$TAG-*" > /dev/null && ! grep -q "$R" /proc/mounts || die "down.sh left processes, namespaces or mounts"
say "down; nothing is left. All checks passed."
