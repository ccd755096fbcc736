#!/bin/bash
# down.sh RUNDIR [--purge]: ends what up.sh started there, and nothing else: what runs in the cgroups of its tag. May be called
# twice. RUNDIR/log stays, unless --purge.
. "$(dirname "$0")/lib.sh"
[ $# -ge 1 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
R=$(realpath -m "$1")
if [ -f "$R/tag" ]; then
  TAG=$(< "$R/tag")
  [[ $TAG == lm?????? ]] || die "$R/tag is not a testbed's"
  rm -f "$R/env"
  # All at once and for good: nothing here has to outlive us, and a polite order would take longer than the tests
  for ((i = 0; i < 100; i++)); do
    pids=$(cgroup_pids)
    [ -n "$pids" ] || break
    # One may be gone by now, which kill calls a failure; whether all are is looked at again, and below.
    # shellcheck disable=SC2086
    kill -KILL $pids 2> /dev/null || :
    sleep 0.1
  done
  [ -z "$pids" ] || die "these would not die: $pids"
  for ns in /run/netns/"$TAG"-*; do [ ! -e "$ns" ] || ip netns del "${ns##*/}"; done
  for tree in $(cgroup_trees); do
    for ((i = 0; i < 50; i++)); do # the kernel may take a moment to see that a cgroup is empty
      find "$tree"/"$TAG"-* -depth -type d -exec rmdir {} + 2> /dev/null && break
      compgen -G "$tree/$TAG-*" > /dev/null || break
      sleep 0.1
    done
  done
  # (another testbed may have mounts on them: removing a folder would unmount it there)
  if [ -f $MOUNTPOINTS ] && ! compgen -G '/run/netns/lm??????-hub' > /dev/null; then
    # Those that something else made or filled meanwhile stay, and are not ours any more.
    tac $MOUNTPOINTS | xargs -r rmdir 2> /dev/null || :
    rm $MOUNTPOINTS
  fi
  find "$R" -mindepth 1 -maxdepth 1 ! -name log -exec rm -rf --one-file-system {} +
fi
if [ "${2:-}" = --purge ]; then rm -rf "$R/log"; rmdir "$R" 2> /dev/null || :; fi # others may keep something there
