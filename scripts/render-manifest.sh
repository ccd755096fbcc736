#!/bin/bash
# render-manifest.sh: writes manifests/lighterman.yaml, the chart with its defaults, for
# `kubectl apply -f`.
# render-manifest.sh --check: exits with 1 when the file differs from the rendered chart, or the
# chart's versions differ from Cargo.toml.
. "$(dirname "$0")/lib.sh"
manifest=manifests/lighterman.yaml

render() { # render HELM
  cat << 'END'
# The chart with its default values, for an installation without helm:
#   kubectl apply -f manifests/lighterman.yaml
# `make manifest` writes this file; edit charts/lighterman instead.
apiVersion: v1
kind: Namespace
metadata:
  name: lighterman
  labels:
    # The agent uses the node's network and its root file system, which the other Pod Security
    # Standards forbid.
    pod-security.kubernetes.io/enforce: privileged
    pod-security.kubernetes.io/warn: privileged
END
  # The manifest contains the policies of Kubernetes 1.30: `helm template` contacts no cluster, so
  # the script names the API.
  "$1" template lighterman charts/lighterman --namespace lighterman \
    --api-versions admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy
}

# The checks without helm.
for field in version appVersion; do
  found=$(sed -n "s/^$field: //p" charts/lighterman/Chart.yaml)
  [ "$found" = "$(package_version)" ] || die "charts/lighterman/Chart.yaml: $field is $found, Cargo.toml has $(package_version)"
done

case ${1:-} in
  --check)
    if ! helm=$(scripts/helm.sh 2>&1); then
      say "check-manifest: SKIPPED the comparison of $manifest with the chart: $(tail -n 1 <<< "$helm")"
      exit 0
    fi
    helm=$(tail -n 1 <<< "$helm")
    "$helm" lint --quiet --strict charts/lighterman
    diff -u --label "$manifest" --label 'rendered from charts/lighterman' "$manifest" <(render "$helm") ||
      die "$manifest differs from the rendered chart: run \`make manifest\`"
    say "check-manifest: ok"
    ;;
  '')
    helm=$(scripts/helm.sh)
    rendered=$(render "$helm")
    printf '%s\n' "$rendered" > "$manifest"
    ;;
  *) die "usage: render-manifest.sh [--check]" ;;
esac
