#!/bin/bash
# ctl.sh RUNDIR SUBCOMMAND ...: acts on a running test bed.
#   in [--mount] hub|NODE CMD...    run CMD in that network namespace; with --mount also in the
#                                   node's mount namespace, with the files that pods see
#   kubectl ARGS...                 as cluster-admin
#   ctr NODE ARGS...                the ctr of that node's containerd, namespace k8s.io
#   push OUT.tar NAME:TAG           push an image of mkimage.sh to the registry, bytes and digests
#                                   unchanged; NAME may begin with the registry's address
#   registry stop|start             connections are refused
#   registry drop|undrop            packets are dropped, so that clients run into their time-outs
#   apiserver stop|start
#   dns stop|start                  start DNS after the API server, which has the Services
#   node NODE containerd-stop|containerd-start|containerd-kill
#   node NODE kubelet-stop|kubelet-start|link-down|link-up
#   node NODE disk-fill PERCENT     fill the file system at /var/lib/containerd (LIGHTERMAN_DISK) to
#                                   PERCENT in use
#   prometheus CONFIG PORT          in the hub's network, on the hub's address and PORT
#   prometheus stop
#   logs [COMPONENT]                the output of a component so far; without COMPONENT: all names
#   status                          the components, and whether each runs
. "$(dirname "$0")/lib.sh"
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit "$1"; }
case " $* " in *' --help '* | *' -h '*) [[ $# -gt 2 ]] || usage 0 ;; esac
[ $# -ge 2 ] || usage 2 >&2
load "$1"
cmd=$2
shift 2
is_node() { [[ ",$NODES," == *",${1:-},"* ]] || die "no node '${1:-}'; the nodes are: $NODES"; }
restart_from() { # restart_from COMPONENT SECONDS PROBE...: start, and wait until PROBE succeeds
  local c=$1 deadline=$((SECONDS + $2 * ${LIGHTERMAN_PATIENCE:-1}))
  shift 2
  start "$c"
  until "$@" > /dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || { tail -n 5 "$R/log/$c.log" >&2; die "$c does not become ready"; }
    sleep 0.1
  done
}
push() {
  local tar=$1 name=${2#"$REGISTRY"/} repo tag api dir digest media url
  name=${name#registry.test:5000/}
  repo=${name%:*} tag=${name##*:}
  api=http://$REGISTRY/v2/$repo
  dir=$(mktemp -d "$R/push.XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$dir'" EXIT
  tar --extract --file "$tar" --directory "$dir"
  file() { echo "$dir/blobs/sha256/${1#sha256:}"; }
  curl() { in_net hub curl -sSf "$@"; }
  send_blob() {
    ! curl -o /dev/null -I "$api/blobs/$1" 2> /dev/null || return 0
    url=$(curl -o /dev/null -X POST -H 'Content-Length: 0' -w '%header{location}' "$api/blobs/uploads/")
    curl -o /dev/null -X PUT -H 'Content-Type: application/octet-stream' -T "$(file "$1")" "$url&digest=$1"
  }
  send_manifest() { # send_manifest DIGEST MEDIATYPE REFERENCE: referenced content first
    local child
    if [[ $2 == *index* ]]; then
      while read -r child; do send_manifest "$child" "$(jq -r .mediaType "$(file "$child")")" "$child"; done < <(jq -r '.manifests[].digest' "$(file "$1")")
    else
      while read -r child; do send_blob "$child"; done < <(jq -r '.config.digest, .layers[].digest' "$(file "$1")")
    fi
    curl -o /dev/null -X PUT -H "Content-Type: $2" --data-binary "@$(file "$1")" "$api/manifests/$3"
  }
  IFS=$'\t' read -r digest media < <(jq -r '.manifests[0] | [.digest, .mediaType] | @tsv' "$dir/index.json")
  send_manifest "$digest" "$media" "$tag"
  echo "$REGISTRY/$repo:$tag $digest"
}

case $cmd in
  in)
    mount=
    if [ "${1:-}" = --mount ]; then mount=1; shift; fi
    side=${1:?hub or a node}
    shift
    [ "$side" = hub ] || is_node "$side"
    echo $$ > "$(cgroup_home)/$TAG-$side/system/cgroup.procs" # down.sh ends the command too
    if [ -n "$mount" ] && [ "$side" != hub ]; then
      exec nsenter --net="/run/netns/$TAG-$side" --mount="/proc/$(< "$R/pid/$side.mounts")/ns/mnt" "$@"
    fi
    exec nsenter --net="/run/netns/$TAG-$side" "$@"
    ;;
  kubectl) kubectl "$@" ;;
  ctr)
    is_node "${1:-}"
    ctr=NODE_$1_CTR socket=NODE_$1_SOCKET
    shift
    exec "${!ctr}" -a "${!socket}" -n k8s.io "$@"
    ;;
  push) push "${1:?OUT.tar}" "${2:?NAME:TAG}" ;;
  registry)
    rule=(INPUT -p tcp --dport 5000 -j DROP)
    case ${1:-} in
      stop) stop registry ;;
      start) restart_from registry 10 in_net hub curl -sf "http://$REGISTRY/v2/" ;;
      drop) for tables in iptables ip6tables; do in_net hub $tables -w -C "${rule[@]}" 2> /dev/null || in_net hub $tables -w -I "${rule[@]}"; done ;;
      undrop) for tables in iptables ip6tables; do in_net hub $tables -w -D "${rule[@]}" 2> /dev/null || true; done ;;
      *) usage 2 >&2 ;;
    esac
    ;;
  apiserver)
    case ${1:-} in
      stop) stop apiserver KILL ;; # after SIGTERM, an API server waits up to a minute for its watches
      start) restart_from apiserver 60 kubectl get --raw /readyz ;;
      *) usage 2 >&2 ;;
    esac
    ;;
  dns)
    case ${1:-} in
      stop) stop coredns ;;
      start) restart_from coredns 20 dns_answers "$DNS_IP" ;;
      *) usage 2 >&2 ;;
    esac
    ;;
  node)
    is_node "${1:-}"
    ctr=NODE_$1_CTR socket=NODE_$1_SOCKET
    case ${2:-} in
      containerd-stop) stop "$1.containerd" ;;
      containerd-kill) stop "$1.containerd" KILL ;;
      containerd-start) restart_from "$1.containerd" 30 "${!ctr}" -a "${!socket}" version ;;
      kubelet-stop) stop "$1.kubelet" ;;
      kubelet-start) restart_from "$1.kubelet" 30 in_net "$1" curl -sf http://127.0.0.1:10248/healthz ;;
      link-down) ip -n "$HUB_NETNS" link set "v-$1" down ;;
      disk-fill)
        # fallocate reserves blocks without writing them, so this takes no time.
        in_node "$1" sh -c 'mountpoint -q /var/lib/containerd && cd /var/lib/containerd && rm -f fill &&
          set -- $1 $(df -B1 --output=size,used . | tail -n 1) && fallocate -l $(($2 / 100 * $1 - $3)) fill && sync -f fill && df . >&2' \
          sh "${3:?PERCENT}"
        ;;
      link-up) ip -n "$HUB_NETNS" link set "v-$1" up ;;
      *) usage 2 >&2 ;;
    esac
    ;;
  prometheus)
    stop prometheus
    [ "${1:-}" != stop ] || exit 0
    config=$(realpath "${1:?CONFIG}")
    define prometheus hub << C
exec nsenter --net=/run/netns/$HUB_NETNS $P/tools/bin/prometheus --config.file=$config --web.listen-address=${REGISTRY%:*}:${2:?PORT} --storage.tsdb.path=$R/prometheus
C
    restart_from prometheus 20 in_net hub curl -sf "http://${REGISTRY%:*}:$2/-/ready"
    ;;
  logs) if [ $# = 0 ]; then (cd "$R/log" && ls); else cat "$R/log/$1.log"; fi ;;
  status)
    for c in "$R"/run/*; do
      c=${c##*/}
      [[ $c == *.mounted ]] || printf '%-22s %s\n' "$c" "$(if alive "$c"; then echo "runs, pid $(< "$R/pid/$c")"; else echo "does not run"; fi)"
    done
    ;;
  *) usage 2 >&2 ;;
esac
