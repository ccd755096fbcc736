# shellcheck shell=bash disable=SC2034
# Functions that the test bed's scripts share. Sourced, not run.
#
# A component (etcd, apiserver, n1.containerd, ...) is a script R/run/COMPONENT that ends in `exec`.
# R/pid/COMPONENT has its process ID, R/log/COMPONENT.log its output. Every process runs in a cgroup
# named after the test bed's tag. down.sh finds all processes by these cgroups, containers included,
# and no others.
set -euo pipefail
TESTBED=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
P=${LIGHTERMAN_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/lighterman}/testbed
MOUNTPOINTS=/run/lighterman-testbed.mountpoints # folders on this machine that up.sh made
T0=$EPOCHREALTIME

elapsed() { local us=$((${EPOCHREALTIME/[.,]/} - ${T0/[.,]/})); printf '%d.%d' $((us / 1000000)) $((us / 100000 % 10)); }
say() { printf '[%6ss] %s\n' "$(elapsed)" "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }
version_at_least() { [ "$(printf '%s\n' "$1" "$2" | sort -V | head -1)" = "$2" ]; } # version_at_least HAVE WANTED

# ---- cgroups: v2 is a single tree. v1 has a tree per controller, and often an empty v2 tree beside
# them, in which runc leaves folders
cgroup_v2() { [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ]; }
cgroup_trees() { if cgroup_v2; then echo /sys/fs/cgroup; else awk '$3 ~ /^cgroup2?$/ { print $2 }' /proc/mounts | sort -u; fi; }
# cgroup_home: the tree in which processes are found
cgroup_home() { if cgroup_v2; then echo /sys/fs/cgroup; else echo /sys/fs/cgroup/pids; fi; }

# cgroup_make NAME: makes the cgroup NAME in every tree, with a leaf `system` for daemons (v2 allows
# processes only in leaves)
cgroup_make() {
  local tree c
  for tree in $(cgroup_trees); do
    mkdir -p "$tree/$1"
    if [ -f "$tree/cpuset.cpus" ]; then # v1: a new cpuset is empty and accepts no process
      cat "$tree/cpuset.cpus" > "$tree/$1/cpuset.cpus"
      cat "$tree/cpuset.mems" > "$tree/$1/cpuset.mems"
    fi
  done
  mkdir -p "$(cgroup_home)/$1/system"
  cgroup_v2 || return 0
  for tree in /sys/fs/cgroup "/sys/fs/cgroup/$1"; do
    for c in $(< "$tree/cgroup.controllers"); do echo "+$c" > "$tree/cgroup.subtree_control" || true; done
  done 2> /dev/null
  for c in cpu cpuset memory pids; do
    grep -qw "$c" "/sys/fs/cgroup/$1/cgroup.subtree_control" || die "cgroup v2: the controller '$c' cannot be delegated to /sys/fs/cgroup/$1.
  In a container, its own processes sit in the root cgroup and block this: move them into a child first, or use the host."
  done
}
cgroup_pids() { find "$(cgroup_home)"/"$TAG"-* -name cgroup.procs -exec cat {} + 2> /dev/null || true; }

# ---- components
# alive COMPONENT: whether the process runs. Outside the test bed's cgroups, the ID is reused
alive() { local pid; pid=$(cat "$R/pid/$1" 2> /dev/null) && grep -q "/$TAG-" "/proc/$pid/cgroup" 2> /dev/null; }
start() {
  alive "$1" && return 0
  setsid nohup "$R/run/$1" >> "$R/log/$1.log" 2>&1 < /dev/null &
  echo $! > "$R/pid/$1"
  disown # otherwise the shell reports the end of the process
  while ! alive "$1" && kill -0 $! 2> /dev/null; do sleep 0.01; done # until the process has joined its cgroup
}
# gone PID: whether the process has ended, also if the parent has not reaped it
gone() { [ ! -d "/proc/$1" ] || grep -q '^State:.Z' "/proc/$1/status" 2> /dev/null || [ ! -d "/proc/$1" ]; }
# stop COMPONENT [SIGNAL]: stops a component and waits for its end; SIGKILL after 5 s
stop() {
  local pid i
  alive "$1" || return 0
  pid=$(< "$R/pid/$1")
  # kill fails if the process ends at this moment. The loop below waits for the end.
  kill "-${2:-TERM}" "$pid" 2> /dev/null || :
  for ((i = 0; i < 250; i++)); do
    ! gone "$pid" || break
    [ "$i" = 100 ] && kill -KILL "$pid" 2> /dev/null
    sleep 0.05
  done
  gone "$pid" || die "$1 (process $pid) does not end"
  rm -f "$R/pid/$1"
}
# define COMPONENT SIDE: writes stdin to R/run/COMPONENT. SIDE is hub or a node, and sets the cgroup
define() {
  { printf '#!/bin/bash\nset -eu\necho $$ > %q\n' "$(cgroup_home)/$TAG-$2/system/cgroup.procs"; cat; } > "$R/run/$1"
  chmod +x "$R/run/$1"
}
# `ip netns exec` would mount a fresh /sys without the cgroups, and runc would fail
in_net() { local side=$1; shift; nsenter --net="/run/netns/$TAG-$side" "$@"; }
in_node() { local node=$1; shift; nsenter --net="/run/netns/$TAG-$node" --mount="/proc/$(< "$R/pid/$node.mounts")/ns/mnt" "$@"; }
# dns_answers ADDRESS: whether this server resolves the API server's name to an address of the
# server's own family
dns_answers() {
  local type=a
  [[ $1 != *:* ]] || type=aaaa
  in_net hub "$P/tools/bin/busybox" nslookup -type=$type kubernetes.default.svc.cluster.local "$1"
}
kubectl() { KUBECACHEDIR="$R/kubectl-cache" in_net hub "$K8S/kubectl" --kubeconfig "$R/admin.kubeconfig" "$@"; }

# load RUNDIR: reads the variables of a running test bed
load() {
  R=$(realpath -m "$1")
  [ -f "$R/env" ] || die "no test bed runs in $R: start one with up.sh"
  # shellcheck disable=SC1091
  . "$R/env"
  K8S=$(dirname "$KUBECTL")
}
