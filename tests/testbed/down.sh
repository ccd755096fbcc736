#!/bin/bash
# down.sh RUNDIR [--purge]: ends everything that up.sh started for RUNDIR: all processes in the
# cgroups of the test bed's tag. A second call is harmless. RUNDIR/log is kept unless --purge is
# given.
. "$(dirname "$0")/lib.sh"
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
R=$(realpath -m "$1")
if [ -f "$R/tag" ]; then
  TAG=$(< "$R/tag")
  [[ $TAG == lm?????? ]] || die "$R/tag is not the tag of a test bed"
  rm -f "$R/env"
  # SIGKILL to all processes at once: no process has state to save, and an orderly shutdown would
  # take longer than the tests.
  for ((i = 0; i < 100; i++)); do
    pids=$(cgroup_pids)
    [ -n "$pids" ] || break
    # kill fails for a process that has just ended. The next round and the check below find the
    # processes that remain.
    # shellcheck disable=SC2086
    kill -KILL $pids 2> /dev/null || :
    sleep 0.1
  done
  [ -z "$pids" ] || die "processes do not end after SIGKILL: $pids"
  for ns in /run/netns/"$TAG"-*; do [ ! -e "$ns" ] || ip netns del "${ns##*/}"; done
  for tree in $(cgroup_trees); do
    for ((i = 0; i < 50; i++)); do # the kernel marks a cgroup as empty after a delay
      find "$tree"/"$TAG"-* -depth -type d -exec rmdir {} + 2> /dev/null && break
      compgen -G "$tree/$TAG-*" > /dev/null || break
      sleep 0.1
    done
  done
  # Another test bed may have mounts on these folders: removing a folder would unmount it there.
  if [ -f $MOUNTPOINTS ] && ! compgen -G '/run/netns/lm??????-hub' > /dev/null; then
    # Folders that are not empty, or that another program has made since, stay.
    tac $MOUNTPOINTS | xargs -r rmdir 2> /dev/null || :
    rm $MOUNTPOINTS
  fi
  find "$R" -mindepth 1 -maxdepth 1 ! -name log -exec rm -rf --one-file-system {} +
fi
if [ "${2:-}" = --purge ]; then rm -rf "$R/log"; rmdir "$R" 2> /dev/null || :; fi # RUNDIR may have other files
