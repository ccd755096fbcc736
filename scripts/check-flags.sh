#!/bin/bash
# check-flags.sh [BINARY]: the chart and the flags of `lighterman agent` name the same things.
# - the variables of src/config/flags.rs and src/cli.rs are those of the DaemonSet, none more and none less, but for OUTSIDE;
# - each that the downward API does not set is one value: LIGHTERMAN_CONCURRENT_UPLOADS is agent.concurrentUploads, also in the schema;
# - with a BINARY, the chart's defaults (as in manifests/lighterman.yaml) are the flags' own.
. "$(dirname "$0")/lib.sh"
chart=charts/lighterman
daemonset=$chart/templates/daemonset.yaml
failed=
# Not for the DaemonSet's: a file in place of the ServiceAccount, a content store at another path than containerd's own (the
# chart mounts it at that one), and a zone, which is one of each node's labels.
OUTSIDE='LIGHTERMAN_KUBECONFIG|LIGHTERMAN_CONTAINERD_CONTENT_ROOT|LIGHTERMAN_ZONE'

# same WHAT LEFT RIGHT: both texts hold the same lines
same() {
  local difference
  difference=$(diff <(sort -u <<< "$2") <(sort -u <<< "$3") | sed -n 's/^[<>]/  &/p' || true)
  [ -n "$difference" ] || return 0
  say "check-flags: $1"$'\n'"$difference"
  failed=1
}
variable_of() { sed -E 's/[A-Z]/_&/g; s/.*/LIGHTERMAN_\U&/'; } # concurrentUploads -> LIGHTERMAN_CONCURRENT_UPLOADS

flags=$(sed -nE 's/.*\benv = "(LIGHTERMAN_[A-Z_]+)".*/\1/p' src/config/flags.rs src/cli.rs | grep -vxE "$OUTSIDE")
in_chart=$(sed -nE 's/.*- name: (LIGHTERMAN_[A-Z_]+)$/\1/p' "$daemonset")
downward=$(grep -B 1 'valueFrom:' "$daemonset" | sed -nE 's/.*- name: (LIGHTERMAN_[A-Z_]+)$/\1/p')
configured=$(grep -vxF "$downward" <<< "$in_chart")
values=$(sed -n '/^agent:/,/^[^ #]/s/^  \([A-Za-z]*\):.*/\1/p' "$chart/values.yaml")
schema=$(sed -n '/^    "agent":/,/^    }/s/^        "\([A-Za-z]*\)": .*/\1/p' "$chart/values.schema.json")
used=$(grep -oE '\$agent\.[A-Za-z]+' "$daemonset" | sed 's/.*\.//')
for found in "$flags" "$downward" "$values" "$schema" "$used"; do
  [ -n "$found" ] || die "a file no longer has the form that this script reads"
done

same "flags (<) and the DaemonSet's variables (>) differ:" "$flags" "$in_chart"
same "the DaemonSet's variables (<) and values.yaml (>) differ:" "$configured" "$(variable_of <<< "$values")"
same "values.yaml (<) and values.schema.json (>) differ:" "$values" "$schema"
same "values.yaml (<) and the DaemonSet (>) differ:" "$values" "$used"

# The help says `[env: NAME=] [default: VALUE]` for each flag that has a default, over several lines.
if [ -n "${1:-}" ]; then
  help=$(env -i "$1" agent --help | tr -s ' \n' ' ')
  of_flags=$(grep -oE '\[env: LIGHTERMAN_[A-Z_]+=\] \[default: [^ ]+\]( |$)' <<< "$help" |
    sed -E 's/^\[env: (.*)=\] \[default: (.*)\] ?$/\1 \2/' | grep -vwF "$downward")
  [ -n "$of_flags" ] || die "$1 agent --help names no defaults"
  names=$(cut -d ' ' -f 1 <<< "$of_flags")
  rendered=$(sed -nE '/- name: LIGHTERMAN_/{N; s/.*name: (\S+)\s+value: "(.*)"$/\1 \2/p}' manifests/lighterman.yaml | grep -wF "$names")
  same "defaults of the flags (<) and of the chart (>) differ:" "$of_flags" "$rendered"
fi

[ -z "$failed" ] || exit 1
say "check-flags: ok ($(wc -w <<< "$in_chart") variables, $(wc -w <<< "$downward") of them set by the downward API:" \
  "$(paste -sd ' ' <<< "${downward//LIGHTERMAN_/}"))"
