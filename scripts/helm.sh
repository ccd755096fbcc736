#!/bin/bash
# helm.sh: prints the path of helm: the machine's, the testbed's, or a helm that the script builds
# with go in the cache folder. Without helm the script exits with 1 and prints the reason to
# standard error.
. "$(dirname "$0")/lib.sh"

have helm && { command -v helm; exit; }
for helm in "$CACHE/testbed/helm/bin/helm" "$CACHE/bin/helm"; do
  [ -x "$helm" ] && { echo "$helm"; exit; }
done
have go || die "helm is missing, and so is go to build helm: install either, or run \`make testbed\`"
say "helm.sh: building helm into $CACHE/bin ..."
mkdir -p "$CACHE/bin"
if ! said=$(GOBIN=$CACHE/bin GOFLAGS='' GOWORK=off CGO_ENABLED=0 go install -trimpath -ldflags '-s -w' helm.sh/helm/v3/cmd/helm@latest 2>&1); then
  die "go install of helm failed: $(tail -n 1 <<< "$said")"
fi
echo "$CACHE/bin/helm"
