#!/bin/bash
# figures.sh OUT COMMAND...: runs each COMMAND (one argument, a shell command) and collects its
# lines `figure NAME VALUE` in OUT, below a header with machine and commit. After a failed COMMAND
# the script continues with the next COMMAND, and fails at the end.
. "$(dirname "$0")/lib.sh"
out=${1:?usage: figures.sh OUT COMMAND...}
shift
[ $# != 0 ] || die "usage: figures.sh OUT COMMAND..."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=()

changed=$(git status --porcelain 2> /dev/null | wc -l)
mkdir -p "$(dirname "$out")"
{
  echo "# date    $(date -u +%Y-%m-%dT%H:%MZ)"
  echo "# cpu     $(nproc) x $(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1)"
  echo "# memory  $(awk '/^MemTotal/ { printf "%.1f GiB", $2 / 1048576 }' /proc/meminfo)"
  echo "# kernel  $(uname -sr)"
  echo "# rustc   $(rustc --version)"
  echo "# commit  $(git rev-parse --short HEAD 2> /dev/null || echo unknown)$([ "$changed" = 0 ] || echo " and $changed changed files")"
} > "$out"

for command; do
  say "figures: $command"
  bash -o pipefail -c "$command" 2>&1 | tee "$log" >&2 || failed+=("$command")
  # criterion and progress bars overwrite their lines with carriage returns.
  figures=$(tr '\r' '\n' < "$log" | grep -E '^figure [^ ]+ .' || true)
  [ -n "$figures" ] || { say "figures: no figure from: $command"; failed+=("$command"); }
  { echo "# from    $command"; [ -z "$figures" ] || echo "$figures"; } >> "$out"
done

cat "$out"
[ ${#failed[@]} = 0 ] || die "failed, or printed no figure: $(printf '%s\n' "${failed[@]}" | sort -u | paste -sd ';')"
