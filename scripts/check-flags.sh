#!/bin/bash
# check-flags.sh [BINARY]: checks that the chart and the flags of `lighterman agent` agree:
# - the variables of src/config/flags.rs and src/cli.rs are the variables of the DaemonSet, except
#   OUTSIDE;
# - each variable that the downward API does not set is one value, in values.yaml and in the schema:
#   LIGHTERMAN_CONCURRENT_UPLOADS is agent.concurrentUploads;
# - with a BINARY, the chart's defaults (as in manifests/lighterman.yaml) are the flags' own.
. "$(dirname "$0")/lib.sh"
chart=charts/lighterman
daemonset=$chart/templates/daemonset.yaml
failed=
# Flags without a variable in the DaemonSet. A kubeconfig replaces the ServiceAccount; the chart
# mounts the content store at containerd's own path; the zone is a label of each node.
OUTSIDE='LIGHTERMAN_KUBECONFIG|LIGHTERMAN_CONTAINERD_CONTENT_ROOT|LIGHTERMAN_ZONE'

# same TITLE LEFT RIGHT: fails where the two texts have different lines
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
  [ -n "$found" ] || die "flags.rs, the DaemonSet, values.yaml or the schema no longer has the form that this script reads"
done

same "flags (<) and the DaemonSet's variables (>) differ:" "$flags" "$in_chart"
same "the DaemonSet's variables (<) and values.yaml (>) differ:" "$configured" "$(variable_of <<< "$values")"
same "values.yaml (<) and values.schema.json (>) differ:" "$values" "$schema"
same "values.yaml (<) and the DaemonSet (>) differ:" "$values" "$used"

# The help has `[env: NAME=] [default: VALUE]` for each flag with a default, over several lines.
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
say "check-flags: ok ($(wc -w <<< "$in_chart") variables; the downward API sets $(wc -w <<< "$downward"):" \
  "$(paste -sd ' ' <<< "${downward//LIGHTERMAN_/}"))"
